"""Triton back end of `ops.neighborhood.neighborhood_attention` (Hassani et al., CVPR 2023, arXiv:2204.07143).

It has the dilation of Hassani and Shi (arXiv:2209.15001), and the relative position bias of the authors' released
weights. The kernels, in `ops.kernels.neighborhood_kernels`, use the online softmax of FlashAttention (Dao et al., 2022,
arXiv:2205.14135):

- `forward`: a program holds the queries of a tile for one head, and computes their scores with the frame, the box of
  all keys that they may attend to. Tiles are small, since the frame of a larger tile has more keys that a query does
  not attend to. So that the bias is read once for many tiles, a program computes a strip of consecutive tiles.
- `backward_queries`: the gradient of the queries, with the loop of `forward`. Each program also sums the gradients of
  the scores over its tiles, for each pair of a tile's position and a frame's position. PyTorch sums these small tables
  over strips, and then over the pairs with the same offset, which gives the gradient of the bias.
- `backward_keys`: the gradients of keys and values. A program holds the keys of a tile, and loops over the queries that
  attend to any of these keys.

There are no atomic additions, so repeated runs give the same bits. The default tile sizes follow from the number of
pairs of a query and a key that are computed, and from the compiler's figures for compute capability 8.0 and 9.0 (no
register is spilled). They were not timed.
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
from ops.kernels.neighborhood_kernels import backward_keys, backward_queries, forward
from retinue.utils.arithmetic import ceil_div

# Target number of programs of the kernels whose programs compute strips of tiles: several per multiprocessor of a large
# GPU at a time, and several times as many.
STRIP_PROGRAMS = 4096


def configs(tokens: int) -> list[TileConfig]:
    """Return the tile configurations that tuning tries for frames of `tokens` tokens."""
    streamed_sizes = sorted({padded(tokens, limit) for limit in (16, 32, 64, 128, 256)})
    choices = itertools.product((16, 32, 64, 128), streamed_sizes, (1, 2, 4, 8), (1, 2, 3))
    return [TileConfig(*choice) for choice in choices]


def _default_tile_config(
    kernel: str, x: Tensor, padded_head_dim: int, group: Sequence[int], size: Sequence[int]
) -> TileConfig:
    """Return the tiles of a kernel for a dilation group, as the registers allow.

    Programs for queries hold a small tile and its whole frame, or a small group as a whole. Programs for keys read the
    bias pair by pair, so their tiles are larger, which needs fewer programs.

    Args:
        kernel: name of the kernel.
        x: input of the kernel; only its data type matters.
        padded_head_dim: number of channels per head after padding.
        group: sides of the largest dilation group.
        size: tokens of a neighbourhood along H and W.
    """
    single_precision, group_tokens = x.dtype == torch.float32, group[0] * group[1]
    if kernel == "backward_keys":
        resident = padded(group_tokens, 32 if single_precision else 64)
        streamed = padded(group_tokens, 16 if single_precision and padded_head_dim > 32 else 32)
        return TileConfig(resident, streamed, num_warps=4, num_stages=1)
    # With heads of 16 channels, the compiler spills the gradient of the bias of a whole frame.
    parted = kernel == "backward_queries" and padded_head_dim == 16
    limit = 256 if not (single_precision or parted) else 64 if padded_head_dim <= 32 else 32
    resident = padded(group_tokens) if group_tokens <= 64 and not single_precision else 16
    _, (frame_h, frame_w) = _frame(_tile(resident, group), group, size)
    streamed = padded(frame_h * frame_w, limit)
    return TileConfig(resident, streamed, num_warps=8 if resident * streamed > 2048 else 4, num_stages=1)


def _even_part(length: int, limit: int) -> int:
    """Return the length of a part when `length` is cut into as few parts as possible of nearly equal length.

    Args:
        length: length to cut.
        limit: maximum length of a part.
    """
    return ceil_div(length, ceil_div(length, limit))


def _tile(resident: int, group: Sequence[int]) -> tuple[int, int]:
    """Return the sides of an about square tile of at most `resident` tokens in a dilation group."""
    # The maximum width is the square root of `resident`, rounded up to a power of two.
    tile_w = _even_part(group[1], 1 << resident.bit_length() // 2)
    return _even_part(group[0], resident // tile_w), tile_w


def _frame(tile: Sequence[int], group: Sequence[int], size: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the smallest frame of a dilation group's tiles: the number of positions before a tile, and its sides."""
    before, sides = [], []
    for tile_side, length, size_side in zip(tile, group, size, strict=True):
        # Neighbourhoods at the ends of the group reach up to `size_side` positions from there, also beyond the tile.
        inside = size_side - tile_side
        before.append(min(length - tile_side, max(size_side // 2, inside)))
        sides.append(before[-1] + tile_side + min(length - tile_side, max((size_side - 1) // 2, inside)))
    return before, sides


def _launch_arguments(
    kernel: str, qkv: Tensor, num_heads: int, size: Sequence[int], dilation: Sequence[int]
) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """Return the number of tiles in the batch, and a kernel's integer arguments and compile-time constants.

    The integers are in the order of the kernels' signatures: from `num_heads` to `dilation_x`.
    """
    B, H, W, channels = qkv.shape
    # Under `torch.compile` with dynamic shapes the sides become constants, since SymPy takes minutes to simplify
    # expressions of tiles and frames in symbols.
    H, W = int(H), int(W)
    D = channels // (3 * num_heads)
    # Sides of the largest dilation group.
    group = ceil_div(H, dilation[0]), ceil_div(W, dilation[1])
    default = _default_tile_config(kernel, qkv, padded(D), group, size)
    _, (frame_h, frame_w) = _frame(_tile(default.resident, group), group, size)
    config = tile_config(f"neighborhood_attention.{kernel}", qkv, padded(D), frame_h * frame_w, default)
    tile = _tile(config.resident, group)
    tiles = ceil_div(group[0], tile[0]), ceil_div(group[1], tile[1])
    integers = (num_heads, H, W, *tiles, *tile, *size, *dilation)
    constants = {
        "D": D,
        "PADDED_D": padded(D),
        "RESIDENT": config.resident,
        "STREAMED": config.streamed,
        "PRECISION": dot_precision(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return B * tiles[0] * tiles[1] * dilation[0] * dilation[1], integers, constants


def _strip_arguments(
    kernel: str, qkv: Tensor, num_heads: int, size: Sequence[int], dilation: Sequence[int]
) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """Return the number of strips, and the arguments of a kernel that computes strips, as `_launch_arguments`.

    The integers are those from `num_heads` to `frame_w`.
    """
    num_tiles, integers, constants = _launch_arguments(kernel, qkv, num_heads, size, dilation)
    _, H, W, _, _, *tile = integers[:7]
    before, frame = _frame(tile, (ceil_div(H, dilation[0]), ceil_div(W, dilation[1])), size)
    strip_tiles = ceil_div(num_tiles * num_heads, STRIP_PROGRAMS)
    integers = (*integers, num_tiles, strip_tiles, *before, *frame)
    constants["FRAME_PARTS"] = int(ceil_div(frame[0] * frame[1], constants["STREAMED"]))
    constants["WORDS"] = bool(frame[0] + frame[1] < 32)
    return ceil_div(num_tiles, strip_tiles), integers, constants


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
    num_strips, integers, constants = _strip_arguments("forward", qkv, num_heads, size, dilation)
    wrap_triton(forward)[(num_strips * num_heads,)](qkv, bias, out, lse, scale, *integers, **constants)
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

    num_strips, integers, constants = _strip_arguments("backward_queries", qkv, num_heads, size, dilation)
    partial_dscores = None
    if bias is not None:
        pairs = constants["RESIDENT"], constants["FRAME_PARTS"] * constants["STREAMED"]
        partial_dscores = lse.new_empty(num_strips, num_heads, *pairs)
    wrap_triton(backward_queries)[(num_strips * num_heads,)](
        qkv, bias, out, dout, lse, delta, dqkv, partial_dscores, scale, *integers, **constants
    )
    dbias = lse.new_zeros(())
    if partial_dscores is not None:
        dbias = _sum_by_offset(partial_dscores.sum(0), integers[5:7], integers[-4:-2], integers[-2:], size)

    num_tiles, integers, constants = _launch_arguments("backward_keys", qkv, num_heads, size, dilation)
    wrap_triton(backward_keys)[(num_tiles * num_heads,)](
        qkv, bias, dout, lse, delta, dqkv, scale, *integers, **constants
    )
    return dqkv, dbias


def _sum_by_offset(
    dscores: Tensor, tile: Sequence[int], before: Sequence[int], frame: Sequence[int], size: Sequence[int]
) -> Tensor:
    """Return the gradient of the bias: the sum of the scores' gradients over all pairs with the same offset.

    Args:
        dscores: (heads, positions of a tile, positions of a frame), both positions padded: gradients of the scores,
            summed over tiles.
        tile: positions of a tile along H and W.
        before: positions of the frame before the tile along H and W.
        frame: positions of a frame along H and W.
        size: tokens of a neighbourhood along H and W.

    Returns:
        (heads, 2 * size[0] - 1, 2 * size[1] - 1).
    """
    dscores = dscores[:, : tile[0] * tile[1], : frame[0] * frame[1]].unflatten(2, frame)
    # Pad the frame to the positions at offsets from 1 - size to size - 1 of any position of the tile. Negative padding
    # cuts off positions that no query attends to.
    (top, left), (bottom, right) = (
        [size_side - 1 - before_side for size_side, before_side in zip(size, before, strict=True)],
        [
            size_side - 1 + before_side + tile_side - frame_side
            for size_side, before_side, tile_side, frame_side in zip(size, before, tile, frame, strict=True)
        ],
    )
    dscores = F.pad(dscores, (left, right, top, bottom)).contiguous()
    head_stride, position_stride, row_stride, _ = dscores.stride()
    shape = (len(dscores), *tile, 2 * size[0] - 1, 2 * size[1] - 1)
    # A step of the query together with the same step of the key keeps their offset. So the view (head, query's y and x
    # in the tile, offset's y and x) moves in both for a step of the query.
    query_strides = (tile[1] * position_stride + row_stride, position_stride + 1)
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
