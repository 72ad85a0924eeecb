"""Triton back end of `ops.neighborhood.neighborhood_attention` (Hassani et al., CVPR 2023, arXiv:2204.07143).

It has the dilation of Hassani and Shi (arXiv:2209.15001), and the relative position bias of the authors' released
weights. The kernels, in `ops.kernels.neighborhood_kernels`, use the online softmax of FlashAttention (Dao et al., 2022,
arXiv:2205.14135):

- `forward` and `backward_queries`: a program holds the queries of a tile for one head, and loops over the box of keys
  around the tile. The second kernel computes the gradient of the queries.
- `backward_keys`: the gradients of keys and values. A program holds the keys of a tile, and loops over the queries that
  attend to any of these keys.
- `backward_bias`: the gradient of the bias. The frame of a tile is the box of all keys that its queries may attend to.
  The offsets from the positions of a tile to the positions of its frame are the same for all tiles, so gradients of the
  scores are summed over tiles, pair by pair. A program does this for a part of the frame and a strip of consecutive
  tiles. PyTorch sums these small partial sums over strips, and then over pairs with the same offset.

There are no atomic additions, so repeated runs give the same bits. The default tile sizes follow from the compiler's
figures for compute capability 8.0 and 9.0 (no register is spilled). They were not timed.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ops.kernels.launch import (
    TileConfig,
    dot_precision,
    forbid_second_derivative,
    kernel_op,
    padded,
    tile_config,
    wrap_triton,
)
from ops.kernels.neighborhood_kernels import backward_bias, backward_keys, backward_queries, forward
from retinue.utils.arithmetic import ceil_div

# Target number of programs of the kernel that sums the gradient of the bias: several per multiprocessor of a large GPU.
BIAS_PROGRAMS = 1024


def configs(tokens: int) -> list[TileConfig]:
    """Return the tile configurations that tuning tries for neighbourhoods of `tokens` tokens."""
    streamed_sizes = sorted({padded(tokens, limit) for limit in (16, 32, 64, 128)})
    choices = itertools.product((16, 32, 64, 128), streamed_sizes, (1, 2, 4, 8), (1, 2, 3))
    return [TileConfig(*choice) for choice in choices]


def _default_tile_config(kernel: str, x: Tensor, padded_head_dim: int, group_tokens: int) -> TileConfig:
    """Return tiles of up to 64 x 32 tokens for half precision and 32 x 32 for float32, as the registers allow.

    Positions and masks take most of the registers. With a pipeline, the bias in the pipeline takes registers as well.

    Args:
        kernel: name of the kernel.
        x: input of the kernel; only its data type matters.
        padded_head_dim: number of channels per head after padding.
        group_tokens: number of tokens of the largest dilation group of an image, which bounds both sizes.
    """
    single_precision = x.dtype == torch.float32
    resident = padded(group_tokens, 32 if single_precision else 64)
    streamed = padded(group_tokens, 16 if single_precision and padded_head_dim > 32 else 32)
    return TileConfig(resident, streamed, num_warps=4, num_stages=2 if kernel == "backward_bias" else 1)


def _even_part(length: int, limit: int) -> int:
    """Return the length of a part when `length` is cut into as few parts as possible of nearly equal length.

    Args:
        length: length to cut.
        limit: maximum length of a part.
    """
    return ceil_div(length, ceil_div(length, limit))


def _launch_arguments(
    kernel: str, qkv: Tensor, num_heads: int, size: Sequence[int], dilation: Sequence[int]
) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """Return the number of tiles in the batch, and a kernel's integer arguments and compile-time constants.

    The integers are in the order of the kernels' signatures: from `num_heads` to `dilation_x`.
    """
    B, H, W, channels = qkv.shape
    D = channels // (3 * num_heads)
    # Sides of the largest dilation group.
    group_h, group_w = ceil_div(H, dilation[0]), ceil_div(W, dilation[1])
    default = _default_tile_config(kernel, qkv, padded(D), group_h * group_w)
    config = tile_config(f"neighborhood_attention.{kernel}", qkv, padded(D), size[0] * size[1], default)
    # Tiles are about square: the maximum width is the square root of `resident`, rounded up to a power of two.
    tile_w = _even_part(group_w, 1 << config.resident.bit_length() // 2)
    tile_h = _even_part(group_h, config.resident // tile_w)
    tiles_y, tiles_x = ceil_div(group_h, tile_h), ceil_div(group_w, tile_w)
    integers = (num_heads, H, W, tiles_y, tiles_x, tile_h, tile_w, *size, *dilation)
    constants = {
        "D": D,
        "PADDED_D": padded(D),
        "RESIDENT": config.resident,
        "STREAMED": config.streamed,
        "PRECISION": dot_precision(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return B * tiles_y * tiles_x * dilation[0] * dilation[1], integers, constants


def _empty_outputs(
    qkv: Tensor, bias: Tensor | None, num_heads: int, size: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    B, H, W, channels = qkv.shape
    return qkv.new_empty(B, H, W, channels // 3), qkv.new_empty(B, H, W, num_heads, dtype=torch.float32)


@kernel_op("retinue::neighborhood_attention", _empty_outputs)
def neighborhood_attention_and_lse(
    qkv: Tensor, bias: Tensor | None, num_heads: int, size: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the output of `neighborhood_attention` and the log-sum-exp of each query, which the backward pass needs.

    Args:
        qkv: (B, H, W, 3C): queries, keys and values, with any strides.
        bias: (num_heads, 2 * size[0] - 1, 2 * size[1] - 1), added to the scores by the offset from query to key; None
            for no bias.
        num_heads: number of heads.
        size: tokens of a neighbourhood along H and W.
        dilation: dilation along H and W.

    Returns:
        The output (B, H, W, C), and the logarithm to base 2 of the softmax's denominator, (B, H, W, heads) in float32.
    """
    qkv, bias = qkv.contiguous(), None if bias is None else bias.contiguous()
    out, lse = _empty_outputs(qkv, bias, num_heads, size, dilation)
    scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5
    num_tiles, integers, constants = _launch_arguments("forward", qkv, num_heads, size, dilation)
    wrap_triton(forward)[(num_tiles * num_heads,)](qkv, bias, out, lse, scale, *integers, **constants)
    return out, lse


def _empty_gradients(qkv: Tensor, bias: Tensor | None, *_) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), qkv.new_empty(() if bias is None else bias.shape, dtype=torch.float32)


@kernel_op("retinue::neighborhood_attention_backward", _empty_gradients)
def neighborhood_attention_backward(
    qkv: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    num_heads: int,
    size: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `qkv` and of `bias`, the latter in float32, or a scalar 0 without a bias.

    `dout` (B, H, W, C) is the gradient of the output. `out` and `lse` are the results of
    `neighborhood_attention_and_lse`, and the further arguments are its arguments.
    """
    qkv, bias, dout = qkv.contiguous(), None if bias is None else bias.contiguous(), dout.contiguous()
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5

    num_tiles, integers, constants = _launch_arguments("backward_queries", qkv, num_heads, size, dilation)
    wrap_triton(backward_queries)[(num_tiles * num_heads,)](
        qkv, bias, out, dout, lse, delta, dqkv, scale, *integers, **constants
    )
    num_tiles, integers, constants = _launch_arguments("backward_keys", qkv, num_heads, size, dilation)
    wrap_triton(backward_keys)[(num_tiles * num_heads,)](
        qkv, bias, dout, lse, delta, dqkv, scale, *integers, **constants
    )
    if bias is None:
        return dqkv, lse.new_zeros(())

    num_tiles, integers, constants = _launch_arguments("backward_bias", qkv, num_heads, size, dilation)
    _, _, _, tiles_y, tiles_x, tile_h, tile_w, *_ = integers
    tile_size = (tile_h, tile_w)
    # A query attends to keys at most size - 1 positions away, and never beyond the first or the last tile.
    margin = [
        min(side - 1, (tiles - 1) * tile_side)
        for side, tiles, tile_side in zip(size, (tiles_y, tiles_x), tile_size, strict=True)
    ]
    frame = [tile_side + 2 * side_margin for tile_side, side_margin in zip(tile_size, margin, strict=True)]
    frame_parts = ceil_div(frame[0] * frame[1], constants["STREAMED"])
    tiles_per_program = ceil_div(num_tiles * num_heads * frame_parts, BIAS_PROGRAMS)
    num_strips = ceil_div(num_tiles, tiles_per_program)
    dscores = lse.new_empty(num_strips, num_heads, constants["RESIDENT"], frame_parts * constants["STREAMED"])
    wrap_triton(backward_bias)[(num_strips * num_heads * frame_parts,)](
        qkv,
        bias,
        dout,
        lse,
        delta,
        dscores,
        scale,
        *integers,
        num_tiles,
        tiles_per_program,
        frame_parts,
        *margin,
        *frame,
        **constants,
    )
    dscores = dscores.sum(0)[:, : tile_size[0] * tile_size[1], : frame[0] * frame[1]].unflatten(2, frame)
    return dqkv, _sum_by_offset(dscores, tile_size, size)


def _sum_by_offset(dscores: Tensor, tile_size: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return the gradient of the bias: the sum of the scores' gradients over all pairs with the same offset.

    Args:
        dscores: (heads, positions of a tile, frame_h, frame_w): gradients of the scores, summed over tiles.
        tile_size: positions of a tile along H and W.
        size: tokens of a neighbourhood along H and W.

    Returns:
        (heads, 2 * size[0] - 1, 2 * size[1] - 1).
    """
    pad_y, pad_x = (
        (2 * side - 2 + tile_side - frame_side) // 2
        for side, tile_side, frame_side in zip(size, tile_size, dscores.shape[2:], strict=True)
    )
    dscores = F.pad(dscores, (pad_x, pad_x, pad_y, pad_y)).contiguous()
    head_stride, position_stride, row_stride, _ = dscores.stride()
    shape = (len(dscores), *tile_size, 2 * size[0] - 1, 2 * size[1] - 1)
    # A step of the query together with the same step of the key keeps their offset. So the view (head, query's y and x
    # in the tile, offset's y and x) moves in both for a step of the query.
    query_strides = (tile_size[1] * position_stride + row_stride, position_stride + 1)
    return dscores.as_strided(shape, (head_stride, *query_strides, row_stride, 1)).sum((1, 2))


def _setup_context(ctx, inputs, output) -> None:
    qkv, bias, *ctx.settings = inputs
    ctx.save_for_backward(qkv, bias, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor, _):
    qkv, bias, out, lse = ctx.saved_tensors
    dqkv, dbias = neighborhood_attention_backward(qkv, bias, out, lse, dout, *ctx.settings)
    return dqkv, None if bias is None else dbias.to(bias.dtype), None, None, None


neighborhood_attention_and_lse.register_autograd(_backward, setup_context=_setup_context)
forbid_second_derivative(neighborhood_attention_backward)


@register_flop_formula(torch.ops.retinue.neighborhood_attention)
def _flops(qkv_shape, bias_shape, num_heads, size, dilation, *args, **kwargs) -> int:
    """Count two matrix products over all pairs of a query and a key of its neighbourhood."""
    B, H, W, channels = qkv_shape
    return 2 * 2 * B * H * W * size[0] * size[1] * (channels // 3)


@register_flop_formula(torch.ops.retinue.neighborhood_attention_backward)
def _backward_flops(
    qkv_shape, bias_shape, output_shape, lse_shape, dout_shape, num_heads, size, dilation, *args, **kwargs
) -> int:
    """Count the four matrix products of the gradients' definition, without the products that the kernels repeat."""
    return 2 * _flops(qkv_shape, bias_shape, num_heads, size, dilation)


def neighborhood_attention(
    qkv: Tensor, bias: Tensor | None, num_heads: int, size: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """Compute `ops.neighborhood.neighborhood_attention` by Triton kernels: from (B, H, W, 3C) to (B, H, W, C).

    The stride is 1 and no side is causal. The caller must have checked that `ops.neighborhood.obstacle` returns None.
    """
    return neighborhood_attention_and_lse(qkv, bias, num_heads, size, dilation)[0]
