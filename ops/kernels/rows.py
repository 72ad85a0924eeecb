"""What the kernels' tiles share: rows of a map to registers and back."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is the GPU's own instruction


@triton.jit
def load_rows(start, row, stride, there, D: tl.constexpr, LANES: tl.constexpr):
    """The rows that are `there`, and zeros for others and beyond D channels: (rows, LANES)."""
    d = tl.arange(0, LANES)
    return tl.load(start + row[:, None] * stride + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_rows(start, row, stride, there, values, D: tl.constexpr, LANES: tl.constexpr):
    d = tl.arange(0, LANES)
    values = values.to(start.dtype.element_ty)
    tl.store(start + row[:, None] * stride + d[None, :], values, mask=there[:, None] & (d < D)[None, :])
