"""Loading rows of a matrix of tokens into registers and storing them, for all Triton kernels."""

import triton
import triton.language as tl

# Softmax is computed to base 2, exp(x) = exp2(x * LOG2E), because GPUs have an instruction for exp2 but not for exp.
LOG2E = tl.constexpr(1.4426950408889634)

# Initial maximum of the scores where a query may attend to no key of a streamed tile: below any score, but finite. With
# a maximum of -inf, the difference between masked scores and the maximum would be NaN.
LOWEST_SCORE = tl.constexpr(-1e30)


@triton.jit
def load_rows(base, row, stride, valid, D: tl.constexpr, PADDED_D: tl.constexpr):
    """Load one head of several tokens, (rows, PADDED_D): zeros where `valid` is false and beyond channel D.

    Args:
        base: pointer to the head's first channel of row 0.
        row: (rows,) indices of the rows.
        stride: number of values from one row to the next.
        valid: (rows,) False for rows that are not read, since they may lie outside the tensor.
        D: number of channels per head.
        PADDED_D: D rounded up to a power of two, as `tl.arange` requires.
    """
    channel = tl.arange(0, PADDED_D)
    mask = valid[:, None] & (channel < D)[None, :]
    return tl.load(base + row[:, None] * stride + channel[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, row, stride, valid, values, D: tl.constexpr, PADDED_D: tl.constexpr):
    """Store `values` (rows, PADDED_D) in the type of `base` where `load_rows` reads; skip rows that are not valid."""
    channel = tl.arange(0, PADDED_D)
    values = values.to(base.dtype.element_ty)
    mask = valid[:, None] & (channel < D)[None, :]
    tl.store(base + row[:, None] * stride + channel[None, :], values, mask=mask)


@triton.jit
def positive_factor(q, scale):
    """Return queries and a factor that give the same scores to base 2, such that the factor is positive.

    Then the maximum of the scores follows from the maximum of the products of queries and keys, and the exponent of a
    weight takes a single instruction. The factor is not 0 either, since 0 times a masked product, -inf, would be NaN.
    """
    return tl.where(scale < 0, -q, q), tl.maximum(tl.abs(scale) * LOG2E, 1e-30)
