"""Triton back end of `ops.deformable.deformable_attention` (Zhu et al., ICLR 2021, arXiv:2010.04159).

The kernels, in `ops.kernels.deformable_kernels`, sample the values directly from the tokens of all levels; samples are
never stored.

- `forward`: a program computes the output of a tile of queries and one head.
- `backward_samples`: the gradients of locations and weights, with the loop of `forward`. It also records which cell of
  its level each sample lies in.
- `backward_values`: the gradient of the values. The samples are sorted by their cells, and each token adds up the
  samples of the four cells around it.

Each sum is computed by one program in a fixed order, without atomic additions, so repeated runs give the same bits. The
gradient of PyTorch's `grid_sample` does not.

The tile sizes follow from the compiler's figures for compute capability 8.0, 9.0 and 10.0 (registers, spills, shared
memory). They were not timed on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from ops.kernels.deformable_kernels import backward_samples, backward_values, forward
from ops.kernels.launch import forbid_second_derivative, kernel_op, padded, wrap_triton
from retinue.utils.arithmetic import ceil_div

# Sampled values that a program over queries holds of one level, and samples that a program over tokens adds up at once.
VALUES, SAMPLES = 2048, 16


def _arguments(value: Tensor, locations: Tensor) -> tuple[int, dict[str, Any]]:
    """Return the number of programs of a kernel over queries, and its arguments for sizes."""
    (B, N, num_heads, D), (_, Q, _, levels, points, _) = value.shape, locations.shape
    padded_points = 1 << (points - 1).bit_length()
    queries = max(1, VALUES // (padded_points * padded(D)))
    return B * num_heads * ceil_div(Q, queries), {
        "queries": Q,
        "tokens": N,
        "num_heads": num_heads,
        "levels": levels,
        "points": points,
        "D": D,
        "PADDED_D": padded(D),
        "POINTS": padded_points,
        "QUERIES": queries,
        "num_warps": 4,
    }


def _empty_output(value: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(len(value), locations.shape[1], value.shape[2] * value.shape[3])


@kernel_op("retinue::deformable_attention", _empty_output)
def deformable_attention_op(value: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Return the output (B, Q, heads * D) of `deformable_attention`, for inputs with any strides."""
    out = _empty_output(value, spatial_shapes, locations, weights)
    programs, arguments = _arguments(value, locations)
    inputs = (t.contiguous() for t in (value, spatial_shapes, locations, weights))
    wrap_triton(forward)[(programs,)](*inputs, out, **arguments)
    return out


def _empty_gradients(
    dout: Tensor, value: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


@kernel_op("retinue::deformable_attention_backward", _empty_gradients)
def deformable_attention_backward(
    dout: Tensor, value: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `value`, `locations` and `weights` from the gradient `dout` of the output."""
    gradients = dvalue, dlocations, dweights = _empty_gradients(dout, value, spatial_shapes, locations, weights)
    dout, value, shapes, locations, weights = (
        t.contiguous() for t in (dout, value, spatial_shapes, locations, weights)
    )
    cells = torch.empty(weights.shape, dtype=torch.int32, device=weights.device)
    programs, arguments = _arguments(value, locations)
    wrap_triton(backward_samples)[(programs,)](
        value, shapes, locations, weights, dout, dlocations, dweights, cells, images=len(value), **arguments
    )
    sorted_cells, order = cells.flatten().sort(stable=True)
    B, N, num_heads, _ = value.shape
    every_cell = torch.arange(4 * B * num_heads * N + 1, dtype=torch.int32, device=cells.device)
    bounds = torch.searchsorted(sorted_cells, every_cell, out_int32=True)
    sizes = {name: arguments[name] for name in ("tokens", "num_heads", "levels", "points", "D", "PADDED_D")}
    wrap_triton(backward_values)[(B * N * num_heads,)](
        shapes, locations, weights, dout, order, bounds, dvalue, **sizes, SAMPLES=SAMPLES, num_warps=1
    )
    return gradients


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout: Tensor):
    dvalue, dlocations, dweights = deformable_attention_backward(dout, *ctx.saved_tensors)
    return dvalue, None, dlocations, dweights


deformable_attention_op.register_autograd(_backward, setup_context=_setup_context)
forbid_second_derivative(deformable_attention_backward)


def deformable_attention(value: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute `ops.deformable.deformable_attention` by Triton kernels.

    The caller must have checked that `ops.deformable.obstacle_to_deformable_kernels` returns None.
    """
    return deformable_attention_op(value, spatial_shapes, locations, weights)
