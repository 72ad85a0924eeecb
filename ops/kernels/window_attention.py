"""Operators of `ops.functional.window_attention`: windows (Liu et al., ICCV 2021, arXiv:2103.14030), grids (Tu et al.,
ECCV 2022, arXiv:2204.01697) and stripes (Dong et al., CVPR 2022, arXiv:2107.00652).

A window's tokens are read where they lie in the map: cutting, shift and mask are arithmetic on their places, so that
nothing is copied. Windows go through tiles under the online softmax of FlashAttention (Dao et al., 2022,
arXiv:2205.14135), with kernels for the gradients of queries, of keys and values, and of the bias. Where a window is one
tile that fits a program's registers, a single kernel computes the weights again and gives all gradients, and nothing
but the inputs is kept for it. The gradient of the bias is summed by each program over a strip of windows, then over the
strips: no atomics, and the same bits in every run.

The tiles are chosen by figures of the compiler (no register spilled, for compute capability 8.0 and 9.0), not timed.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ops.kernels.launch import Tiles, dot_precision, forbid_second_derivative, kernel_op, padded, tiles, wrap_triton
from ops.kernels.window_tiles import backward_bias, backward_keys, backward_queries, backward_tile, forward

TILE = 64  # most tokens of a tile
STRIPED_PROGRAMS = 512  # of a kernel that sums the gradient of the bias: some for each multiprocessor of a large GPU


def _divided(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def configs(tokens: int) -> list[Tiles]:
    """Candidates for `TUNED`: tiles for windows of so many tokens."""
    sides = sorted({padded(tokens, most) for most in (16, 32, TILE)})
    return [Tiles(*choice) for choice in itertools.product(sides, sides, (1, 2, 4, 8), (1, 2, 3))]


def _tiling(kernel: str, qkv: Tensor, lanes: int, tokens: int) -> tuple[dict[str, int], int]:
    """The tiles and options of a kernel, and how many of them a window's tokens are."""
    half = qkv.element_size() == 2
    own = padded(tokens, TILE if half else TILE // 2)
    other = own if lanes <= 32 else min(own, 32)
    warps = own // 16 * (1 if half else lanes // 16)
    default = Tiles(own, other, warps, 1 if kernel in ("backward_tile", "backward_bias") else 2)
    own, other, warps, stages = tiles(f"window_attention.{kernel}", qkv, lanes, tokens, default)
    return {"OWN": own, "OTHER": other, "num_warps": warps, "num_stages": stages}, _divided(tokens, own)


def _is_one_tile(qkv: Tensor, num_heads: int, window: Sequence[int]) -> bool:
    """Whether the backward pass of a window fits the registers of a program."""
    return window[0] * window[1] <= TILE and qkv.element_size() == 2 and qkv.shape[-1] <= 32 * num_heads


def _in_rows(x: Tensor) -> Tensor:
    """(B, H, W, ...) as (tokens, ...) with channels side by side; a slice of channels is not copied."""
    x = x.flatten(0, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _arguments(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
    grid: bool,
) -> tuple[int, int, dict[str, Any]]:
    """Windows of the batch, tokens of a window, and what all kernels are told of their inputs and of sizes."""
    B, H, W, _, C = qkv.shape
    tokens, rows = window[0] * window[1], _in_rows(qkv)
    side = padded(tokens) if tokens <= TILE else _divided(tokens, TILE) * TILE  # rows of aligned words, whole tiles
    arguments = {
        "qkv": rows,
        "bias": rows if bias is None else F.pad(bias.to(qkv.dtype), (0, side - tokens, 0, side - tokens)),
        "scale": scale,
        "stride": rows.stride(0),
        "part": rows.stride(1),
        "heads": num_heads,
        "H": H,
        "W": W,
        "shift_y": shift[0],
        "shift_x": shift[1],
        "HEIGHT": window[0],
        "WIDTH": window[1],
        "GRID": grid,
        "SHIFTED": shift[0] > 0 or shift[1] > 0,
        "BIASED": bias is not None,
        "D": C // num_heads,
        "LANES": padded(C // num_heads),
        "PADDED": side,
        "PRECISION": dot_precision(),
    }
    return B * H * W // tokens, tokens, arguments


def _empty_outputs(qkv: Tensor, bias: Tensor | None, num_heads: int, window: Sequence[int], *others):
    B, H, W, _, C = qkv.shape
    kept = 0 if _is_one_tile(qkv, num_heads, window) else B
    return qkv.new_empty(B, H, W, C), qkv.new_empty(kept, H, W, num_heads, dtype=torch.float32)


def _empty_gradients(qkv: Tensor, bias: Tensor | None, *others):
    return qkv.new_empty(qkv.shape), qkv.new_empty(0) if bias is None else bias.new_empty(bias.shape)


@kernel_op("retinue::window_attention", _empty_outputs)
def window_attention_and_lse(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
    grid: bool,
) -> tuple[Tensor, Tensor]:
    """`window_attention`, and of each query the logarithm to base 2 of the softmax's denominator, (B, H, W, heads),
    where windows are larger than a tile."""
    out, lse = _empty_outputs(qkv, bias, num_heads, window)
    windows, tokens, arguments = _arguments(qkv, bias, num_heads, window, shift, scale, grid)
    tiling, blocks = _tiling("forward", qkv, arguments["LANES"], tokens)
    wrap_triton(forward)[(windows * num_heads * blocks,)](
        out=out, lse=lse, KEEP_LSE=lse.numel() > 0, blocks=blocks, **arguments, **tiling
    )
    return out, lse


@kernel_op("retinue::window_attention_backward", _empty_gradients)
def window_attention_backward(
    qkv: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
    grid: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of `qkv` and of `bias`, empty if there is none; `out` and `lse` belong to larger windows only."""
    windows, tokens, arguments = _arguments(qkv, bias, num_heads, window, shift, scale, grid)
    dout, dqkv, side = _in_rows(dout), qkv.new_empty(qkv.shape), arguments["PADDED"]
    arguments |= {"dout": dout, "dout_stride": dout.stride(0)}
    if out is None or lse is None:
        tiling, _ = _tiling("backward_tile", qkv, arguments["LANES"], tokens)
        strip = 1 if bias is None else _divided(windows * num_heads, STRIPED_PROGRAMS)
        strips = _divided(windows, strip)
        dbias = qkv.new_empty(0 if bias is None else strips, num_heads, side, side, dtype=torch.float32)
        wrap_triton(backward_tile)[(strips * num_heads,)](
            dqkv=dqkv, dbias=dbias, windows=windows, strip=strip, **arguments, **tiling
        )
    else:
        arguments |= {"lse": lse, "delta": torch.empty_like(lse)}
        tiling, blocks = _tiling("backward_queries", qkv, arguments["LANES"], tokens)
        wrap_triton(backward_queries)[(windows * num_heads * blocks,)](
            out=out, dqkv=dqkv, blocks=blocks, **arguments, **tiling
        )
        tiling, blocks = _tiling("backward_keys", qkv, arguments["LANES"], tokens)
        wrap_triton(backward_keys)[(windows * num_heads * blocks,)](dqkv=dqkv, blocks=blocks, **arguments, **tiling)
        if bias is not None:
            tiling, _ = _tiling("backward_bias", qkv, arguments["LANES"], tokens)
            programs = num_heads * (side // tiling["OWN"]) * (side // tiling["OTHER"])
            strip = _divided(windows * programs, STRIPED_PROGRAMS)
            strips = _divided(windows, strip)
            dbias = qkv.new_empty(strips, num_heads, side, side, dtype=torch.float32)
            wrap_triton(backward_bias)[(strips * programs,)](
                dbias=dbias, windows=windows, strip=strip, **arguments, **tiling
            )
    if bias is None:
        return dqkv, qkv.new_empty(0)
    return dqkv, dbias.sum(0)[:, :tokens, :tokens].to(bias.dtype).contiguous()


def _setup_context(ctx, inputs, output) -> None:
    qkv, bias, *ctx.others = inputs
    ctx.save_for_backward(qkv, bias, *((None, None) if _is_one_tile(qkv, *inputs[2:4]) else output))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor, _):
    qkv, bias, out, lse = ctx.saved_tensors
    dqkv, dbias = window_attention_backward(qkv, bias, dout, out, lse, *ctx.others)
    return dqkv, None if bias is None else dbias, *[None] * len(ctx.others)


window_attention_and_lse.register_autograd(_backward, setup_context=_setup_context)
forbid_second_derivative(window_attention_backward)


@register_flop_formula(torch.ops.retinue.window_attention)
def _flops(qkv_shape, bias_shape, num_heads, window, *args, **kwargs) -> int:
    """Of two products of matrices over the pairs of tokens of a window, masked ones included."""
    B, H, W, _, C = qkv_shape
    return 2 * 2 * B * H * W * window[0] * window[1] * C


@register_flop_formula(torch.ops.retinue.window_attention_backward)
def _backward_flops(
    qkv_shape, bias_shape, dout_shape, out_shape_, lse_shape, num_heads, window, *args, **kwargs
) -> int:
    """Of the four products by definition; those that the kernels repeat are not counted."""
    return 2 * _flops(qkv_shape, bias_shape, num_heads, window)


def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    grid: bool,
) -> Tensor:
    """`ops.functional.window_attention`, for what `ops.backend.obstacle_to_kernels` finds nothing against."""
    return window_attention_and_lse(qkv, bias, num_heads, window, shift, scale, grid)[0]
