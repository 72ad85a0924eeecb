"""Triton back end of `ops.functional.window_attention`.

It serves windows (Liu et al., ICCV 2021, arXiv:2103.14030), grids (Tu et al., ECCV 2022, arXiv:2204.01697) and stripes
(Dong et al., CVPR 2022, arXiv:2107.00652).

The kernels, in `ops.kernels.window_kernels`, read a window's tokens directly from the map. They compute the tokens'
addresses from the window, the shift and the pattern, so nothing is copied. Windows are processed in tiles under the
online softmax of FlashAttention (Dao et al., 2022, arXiv:2205.14135). The backward pass takes one of two ways:

- A window that fits the registers of a program is one tile (`_is_one_tile`). A single kernel, `backward_tile`, computes
  the weights again and all gradients. It needs only the inputs of the forward pass.
- For a larger window, `backward_queries`, `backward_keys` and `backward_bias` compute the gradients of the queries, of
  the keys and values, and of the bias. They need the forward pass's output and log-sum-exp.

A program sums the gradient of the bias over a strip of consecutive windows, and PyTorch sums these partial sums. There
are no atomic additions, so repeated runs give the same bits.

The default tile sizes follow from the compiler's figures for compute capability 8.0 and 9.0 (no register is spilled).
One H100 timed them (docs/kernels.md).
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
from ops.kernels.window_kernels import backward_bias, backward_keys, backward_queries, backward_tile, forward
from retinue.utils.arithmetic import ceil_div, round_up

# Maximum number of tokens of a tile.
MAX_TILE = 64

# Target number of programs of a kernel that sums the gradient of the bias: several per multiprocessor of a large GPU.
BIAS_PROGRAMS = 512


def configs(tokens: int) -> list[TileConfig]:
    """Return the tile configurations that tuning tries for windows of `tokens` tokens."""
    sizes = sorted({padded(tokens, limit) for limit in (16, 32, MAX_TILE)})
    return [TileConfig(*choice) for choice in itertools.product(sizes, sizes, (1, 2, 4, 8), (1, 2, 3))]


def _tile_arguments(kernel: str, qkv: Tensor, padded_head_dim: int, tokens: int) -> tuple[dict[str, int], int]:
    """Return a kernel's arguments for tiles and the compiler, and the number of resident tiles that cover a window."""
    half = qkv.element_size() == 2
    resident = padded(tokens, MAX_TILE if half else MAX_TILE // 2)
    streamed = resident if padded_head_dim <= 32 else min(resident, 32)
    num_warps = resident // 16 * (1 if half else padded_head_dim // 16)
    num_stages = 1 if kernel in ("backward_tile", "backward_bias") else 2
    default = TileConfig(resident, streamed, num_warps, num_stages)
    config = tile_config(f"window_attention.{kernel}", qkv, padded_head_dim, tokens, default)
    arguments = {
        "RESIDENT": config.resident,
        "STREAMED": config.streamed,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return arguments, ceil_div(tokens, config.resident)


def _is_one_tile(qkv: Tensor, num_heads: int, window: Sequence[int]) -> bool:
    """Return whether the backward pass of a whole window fits the registers of one program."""
    return window[0] * window[1] <= MAX_TILE and qkv.element_size() == 2 and qkv.shape[-1] <= 32 * num_heads


def _as_rows(x: Tensor) -> Tensor:
    """Return (B, H, W, ...) as (tokens, ...), whose last dimension has stride 1; a slice of channels is not copied."""
    x = x.flatten(0, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _shared_arguments(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
    grid: bool,
) -> tuple[int, int, dict[str, Any]]:
    """Return the number of windows in the batch, the tokens per window, and the arguments that all kernels take."""
    B, H, W, _, C = qkv.shape
    tokens, rows = window[0] * window[1], _as_rows(qkv)
    # Padding to whole tiles lets the kernels read the bias without a mask, in aligned words.
    bias_side = padded(tokens) if tokens <= MAX_TILE else round_up(tokens, MAX_TILE)
    padding = bias_side - tokens
    arguments = {
        "qkv": rows,
        # Without a bias, the kernels need some pointer, but do not read from it.
        "bias": rows if bias is None else F.pad(bias.to(qkv.dtype), (0, padding, 0, padding)),
        "scale": scale,
        "token_stride": rows.stride(0),
        "part_stride": rows.stride(1),
        "num_heads": num_heads,
        "H": H,
        "W": W,
        "shift_y": shift[0],
        "shift_x": shift[1],
        "WINDOW_H": window[0],
        "WINDOW_W": window[1],
        "GRID": grid,
        "SHIFTED": shift[0] > 0 or shift[1] > 0,
        "BIASED": bias is not None,
        "D": C // num_heads,
        "PADDED_D": padded(C // num_heads),
        "BIAS_SIDE": bias_side,
        "PRECISION": dot_precision(),
    }
    return B * H * W // tokens, tokens, arguments


def _empty_outputs(
    qkv: Tensor, bias: Tensor | None, num_heads: int, window: Sequence[int], *_
) -> tuple[Tensor, Tensor]:
    B, H, W, _, C = qkv.shape
    images_with_lse = 0 if _is_one_tile(qkv, num_heads, window) else B
    return qkv.new_empty(B, H, W, C), qkv.new_empty(images_with_lse, H, W, num_heads, dtype=torch.float32)


def _empty_gradients(qkv: Tensor, bias: Tensor | None, *_) -> tuple[Tensor, Tensor]:
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
    """Return the output of `window_attention` and, if the backward pass needs it, the log-sum-exp of each query.

    Args:
        qkv: (B, H, W, 3, C): queries, keys and values; a slice of channels is not copied.
        bias: (num_heads, N, N) for windows of N tokens, added to the scores; None for no bias.
        num_heads: number of heads.
        window: tokens along H and W, which divide H and W.
        shift: tokens by which the map is rolled up and left.
        scale: factor on the scores before the softmax.
        grid: whether a window's tokens are spread evenly over the map, rather than side by side.

    Returns:
        The output (B, H, W, C), and the logarithm to base 2 of the softmax's denominator in float32, (B, H, W, heads),
        or (0, H, W, heads) where a window is one tile.
    """
    out, lse = _empty_outputs(qkv, bias, num_heads, window)
    num_windows, tokens, arguments = _shared_arguments(qkv, bias, num_heads, window, shift, scale, grid)
    tile_arguments, tiles_per_window = _tile_arguments("forward", qkv, arguments["PADDED_D"], tokens)
    wrap_triton(forward)[(num_windows * num_heads * tiles_per_window,)](
        out=out, lse=lse, KEEP_LSE=lse.numel() > 0, tiles_per_window=tiles_per_window, **arguments, **tile_arguments
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
    """Return the gradients of `qkv` (B, H, W, 3, C) and of `bias` (num_heads, N, N), which is empty without a bias.

    `dout` (B, H, W, C) is the gradient of the output. `out` and `lse` are the results of `window_attention_and_lse`, or
    both None where a window is one tile. The further arguments are those of `window_attention_and_lse`.
    """
    num_windows, tokens, arguments = _shared_arguments(qkv, bias, num_heads, window, shift, scale, grid)
    dout, dqkv = _as_rows(dout), qkv.new_empty(qkv.shape)
    padded_head_dim, bias_side = arguments["PADDED_D"], arguments["BIAS_SIDE"]
    arguments |= {"dout": dout, "dout_stride": dout.stride(0)}
    if out is None or lse is None:
        tile_arguments, _ = _tile_arguments("backward_tile", qkv, padded_head_dim, tokens)
        # Without a bias there is nothing to sum over windows.
        windows_per_program = 1 if bias is None else ceil_div(num_windows * num_heads, BIAS_PROGRAMS)
        num_strips = ceil_div(num_windows, windows_per_program)
        num_partial_sums = 0 if bias is None else num_strips
        partial_dbias = qkv.new_empty(num_partial_sums, num_heads, bias_side, bias_side, dtype=torch.float32)
        wrap_triton(backward_tile)[(num_strips * num_heads,)](
            dqkv=dqkv,
            partial_dbias=partial_dbias,
            num_windows=num_windows,
            windows_per_program=windows_per_program,
            **arguments,
            **tile_arguments,
        )
    else:
        arguments |= {"lse": lse, "delta": torch.empty_like(lse)}
        tile_arguments, tiles_per_window = _tile_arguments("backward_queries", qkv, padded_head_dim, tokens)
        wrap_triton(backward_queries)[(num_windows * num_heads * tiles_per_window,)](
            out=out, dqkv=dqkv, tiles_per_window=tiles_per_window, **arguments, **tile_arguments
        )
        tile_arguments, tiles_per_window = _tile_arguments("backward_keys", qkv, padded_head_dim, tokens)
        wrap_triton(backward_keys)[(num_windows * num_heads * tiles_per_window,)](
            dqkv=dqkv, tiles_per_window=tiles_per_window, **arguments, **tile_arguments
        )
        if bias is not None:
            tile_arguments, _ = _tile_arguments("backward_bias", qkv, padded_head_dim, tokens)
            bias_tiles = (bias_side // tile_arguments["RESIDENT"]) * (bias_side // tile_arguments["STREAMED"])
            programs_per_strip = num_heads * bias_tiles
            windows_per_program = ceil_div(num_windows * programs_per_strip, BIAS_PROGRAMS)
            num_strips = ceil_div(num_windows, windows_per_program)
            partial_dbias = qkv.new_empty(num_strips, num_heads, bias_side, bias_side, dtype=torch.float32)
            wrap_triton(backward_bias)[(num_strips * programs_per_strip,)](
                partial_dbias=partial_dbias,
                num_windows=num_windows,
                windows_per_program=windows_per_program,
                **arguments,
                **tile_arguments,
            )
    if bias is None:
        return dqkv, qkv.new_empty(0)
    return dqkv, partial_dbias.sum(0)[:, :tokens, :tokens].to(bias.dtype).contiguous()


def _setup_context(ctx, inputs, output) -> None:
    qkv, bias, *ctx.settings = inputs
    _, _, num_heads, window, *_ = inputs
    out, lse = (None, None) if _is_one_tile(qkv, num_heads, window) else output
    ctx.save_for_backward(qkv, bias, out, lse)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor, _):
    qkv, bias, out, lse = ctx.saved_tensors
    dqkv, dbias = window_attention_backward(qkv, bias, dout, out, lse, *ctx.settings)
    return dqkv, None if bias is None else dbias, *[None] * len(ctx.settings)


window_attention_and_lse.register_autograd(_backward, setup_context=_setup_context)
forbid_second_derivative(window_attention_backward)


@register_flop_formula(torch.ops.retinue.window_attention)
def _flops(qkv_shape, bias_shape, num_heads, window, *args, **kwargs) -> int:
    """Count two matrix products over all pairs of tokens of a window, masked pairs included."""
    B, H, W, _, C = qkv_shape
    return 2 * 2 * B * H * W * window[0] * window[1] * C


@register_flop_formula(torch.ops.retinue.window_attention_backward)
def _backward_flops(
    qkv_shape, bias_shape, dout_shape, output_shape, lse_shape, num_heads, window, *args, **kwargs
) -> int:
    """Count the four matrix products of the gradients' definition, without the products that the kernels repeat."""
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
    """Compute `ops.functional.window_attention` by Triton kernels: from (B, H, W, 3, C) to (B, H, W, C).

    The caller must have checked that `ops.backend.obstacle_to_kernels(qkv, head_dim)` returns None. `grid` is True for
    the pattern "grid" and False for "window".
    """
    return window_attention_and_lse(qkv, bias, num_heads, window, shift, scale, grid)[0]
