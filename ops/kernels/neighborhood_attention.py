"""Operators of `ops.neighborhood.neighborhood_attention` (Hassani et al., CVPR 2023, arXiv:2204.07143; dilated: Hassani
and Shi, arXiv:2209.15001), with the bias by relative position that their released weights have.

Under the online softmax of FlashAttention (Dao et al., 2022, arXiv:2205.14135), by four kernels:

- forward, and queries' gradient: a program holds the queries of a tile for a head, and loops over the keys about it;
- keys' and values' gradients: it holds the keys of a tile, and loops over the queries that see any of them;
- the bias's gradient: offsets from the queries of a tile to the keys of a box about it, its frame, are the same for all
  tiles, so that the gradients of scores can be summed over tiles pair by pair. A program does so for a part of the
  frame and a strip of tiles; what is left to sum is small.

No atomics: the same bits in every run. The tiles are chosen by figures of the compiler (no register spilled, for
compute capability 8.0 and 9.0), not timed.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ops.kernels.launch import Tiles, dot_precision, forbid_second_derivative, kernel_op, padded, tiles, wrap_triton
from ops.kernels.neighborhood_tiles import backward_bias, backward_keys, backward_queries, forward

BIAS_PROGRAMS = 1024  # of the kernel that sums the bias's gradient: some for each multiprocessor of a large GPU


def configs(tokens: int) -> list[Tiles]:
    """Candidates for `TUNED`: tiles for neighbourhoods of so many tokens."""
    others = sorted({padded(tokens, most) for most in (16, 32, 64, 128)})
    return [Tiles(*choice) for choice in itertools.product((16, 32, 64, 128), others, (1, 2, 4, 8), (1, 2, 3))]


def _default_tiles(name: str, x: Tensor, lanes: int, tokens: int) -> Tiles:
    """By registers, most of which go into places and masks, and, where there is a pipeline, into the bias in it."""
    single = x.dtype == torch.float32
    own, other = padded(tokens, 32 if single else 64), padded(tokens, 16 if single and lanes > 32 else 32)
    return Tiles(own, other, num_warps=4, num_stages=2 if name == "backward_bias" else 1)


def _even(length: int, most: int) -> int:
    """Length of the fewest equal parts of at most `most` that hold `length`."""
    return -(-length // -(-length // most))


def _launch(
    name: str, qkv: Tensor, num_heads: int, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """The number of tiles of a kernel; the numbers and the constants that it is told."""
    B, H, W, channels = qkv.shape
    D = channels // (3 * num_heads)
    height, width = -(-H // dilation[0]), -(-W // dilation[1])  # of the longest class
    default = _default_tiles(name, qkv, padded(D), height * width)
    own, other, num_warps, num_stages = tiles(
        f"neighborhood_attention.{name}", qkv, padded(D), kernel[0] * kernel[1], default
    )
    size_x = _even(width, 1 << own.bit_length() // 2)
    size_y = _even(height, own // size_x)
    tiles_y, tiles_x = -(-height // size_y), -(-width // size_x)
    numbers = (num_heads, H, W, tiles_y, tiles_x, size_y, size_x, *kernel, *dilation)
    constants = {"D": D, "LANES": padded(D), "OWN": own, "OTHER": other, "PRECISION": dot_precision()}
    constants |= {"num_warps": num_warps, "num_stages": num_stages}
    return B * tiles_y * tiles_x * dilation[0] * dilation[1], numbers, constants


def _empty_outputs(qkv: Tensor, bias: Tensor | None, num_heads: int, kernel: Sequence[int], dilation: Sequence[int]):
    B, H, W, channels = qkv.shape
    return qkv.new_empty(B, H, W, channels // 3), qkv.new_empty(B, H, W, num_heads, dtype=torch.float32)


@kernel_op("retinue::neighborhood_attention", _empty_outputs)
def neighborhood_attention_and_lse(
    qkv: Tensor, bias: Tensor | None, num_heads: int, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """`neighborhood_attention`, and of each query the logarithm to base 2 of the softmax's denominator."""
    qkv, bias = qkv.contiguous(), None if bias is None else bias.contiguous()
    out, lse = _empty_outputs(qkv, bias, num_heads, kernel, dilation)
    scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5
    count, numbers, constants = _launch("forward", qkv, num_heads, kernel, dilation)
    wrap_triton(forward)[(count * num_heads,)](qkv, bias, out, lse, scale, *numbers, **constants)
    return out, lse


def _empty_gradients(qkv: Tensor, bias: Tensor | None, *others):
    return torch.empty_like(qkv), qkv.new_empty(() if bias is None else bias.shape, dtype=torch.float32)


@kernel_op("retinue::neighborhood_attention_backward", _empty_gradients)
def neighborhood_attention_backward(
    qkv: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    num_heads: int,
    kernel: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The gradients of `qkv`, and of `bias` in float32: of no dimensions where there is none."""
    qkv, bias, dout = qkv.contiguous(), None if bias is None else bias.contiguous(), dout.contiguous()
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5

    count, numbers, constants = _launch("backward_queries", qkv, num_heads, kernel, dilation)
    wrap_triton(backward_queries)[(count * num_heads,)](
        qkv, bias, out, dout, lse, delta, dqkv, scale, *numbers, **constants
    )
    count, numbers, constants = _launch("backward_keys", qkv, num_heads, kernel, dilation)
    wrap_triton(backward_keys)[(count * num_heads,)](qkv, bias, dout, lse, delta, dqkv, scale, *numbers, **constants)
    if bias is None:
        return dqkv, lse.new_zeros(())

    count, numbers, constants = _launch("backward_bias", qkv, num_heads, kernel, dilation)
    tiles_y, tiles_x, *size = numbers[3:7]
    # a tile's queries see no key that is further from it than the first tile is from the last
    before = [min(k - 1, (n - 1) * own) for k, n, own in zip(kernel, (tiles_y, tiles_x), size, strict=True)]
    frame = [own + 2 * more for own, more in zip(size, before, strict=True)]
    blocks = -(-frame[0] * frame[1] // constants["OTHER"])
    strip = -(-count * num_heads * blocks // BIAS_PROGRAMS)
    strips = -(-count // strip)
    dscores = lse.new_empty(strips, num_heads, constants["OWN"], blocks * constants["OTHER"])
    wrap_triton(backward_bias)[(strips * num_heads * blocks,)](
        qkv, bias, dout, lse, delta, dscores, scale, *numbers, count, strip, blocks, *before, *frame, **constants
    )
    dscores = dscores.sum(0)[:, : size[0] * size[1], : frame[0] * frame[1]].unflatten(2, frame)
    return dqkv, _sum_by_offset(dscores, size, kernel)


def _sum_by_offset(dscores: Tensor, size: Sequence[int], kernel: Sequence[int]) -> Tensor:
    """From (heads, places of a tile, frame_y, frame_x) to the gradient of the bias, (heads, 2 * kernel[0] - 1, ...)."""
    pad_y, pad_x = ((2 * k - 2 + n - frame) // 2 for k, n, frame in zip(kernel, size, dscores.shape[2:], strict=True))
    dscores = F.pad(dscores, (pad_x, pad_x, pad_y, pad_y)).contiguous()
    head, place, row, _ = dscores.stride()
    shape = (len(dscores), *size, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    # one step of the query and of the key together leaves their offset
    return dscores.as_strided(shape, (head, size[1] * place + row, place + 1, row, 1)).sum((1, 2))


def _setup_context(ctx, inputs, output) -> None:
    qkv, bias, *ctx.others = inputs
    ctx.save_for_backward(qkv, bias, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor, _):
    qkv, bias, *outputs = ctx.saved_tensors
    dqkv, dbias = neighborhood_attention_backward(qkv, bias, *outputs, dout, *ctx.others)
    return dqkv, None if bias is None else dbias.to(bias.dtype), None, None, None


neighborhood_attention_and_lse.register_autograd(_backward, setup_context=_setup_context)
forbid_second_derivative(neighborhood_attention_backward)


@register_flop_formula(torch.ops.retinue.neighborhood_attention)
def _flops(qkv_shape, bias_shape, num_heads, kernel, dilation, *args, **kwargs) -> int:
    """Of two products of matrices over the pairs of a query and a key that it sees."""
    B, H, W, channels = qkv_shape
    return 2 * 2 * B * H * W * kernel[0] * kernel[1] * (channels // 3)


@register_flop_formula(torch.ops.retinue.neighborhood_attention_backward)
def _backward_flops(
    qkv_shape, bias_shape, out_shape_, lse_shape, dout_shape, num_heads, kernel, dilation, *args, **kwargs
) -> int:
    """Of the four products by definition; those that the kernels repeat are not counted."""
    return 2 * _flops(qkv_shape, bias_shape, num_heads, kernel, dilation)


def neighborhood_attention(
    qkv: Tensor, bias: Tensor | None, num_heads: int, kernel: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """`ops.neighborhood.neighborhood_attention` of stride 1 that is not causal, for what nothing is found against."""
    return neighborhood_attention_and_lse(qkv, bias, num_heads, kernel, dilation)[0]
