"""Triton back end of `ops.functional.routed_attention`, bi-level routing (Zhu et al., CVPR 2023, arXiv:2303.08810).

The kernels read keys and values directly from the map, window by window in the order of the routes, and use the online
softmax of FlashAttention (Dao et al., 2022, arXiv:2205.14135). So the chosen keys and values are never copied together
in memory. There are three kernels, in `ops.kernels.routed_kernels`:

- `forward`: a program holds a tile of queries of one window and one head, and loops over the keys of the windows that
  its window chose.
- `backward_queries`: the gradient of the queries, with the loop of `forward`. It also records in two small tables which
  windows chose each window. This needs no extra launch, whereas sorting the routes takes about ten launches.
- `backward_keys`: the gradients of keys and values. A program holds a tile of keys of one window and one head, and
  loops over the queries of the windows that chose its window.

Where windows are small, the three kernels of `ops.kernels.routed_small_kernels` take their place: a tile spans several
windows, and words of 64 bits mask the pairs of a query and a key that do not attend to each other.

Each sum is computed by one program in a fixed order, without atomic additions, so repeated runs give the same bits.

The default tile sizes follow from the compiler's figures for compute capability 8.0 and 9.0 (registers, spills, shared
memory). They were not timed on a GPU.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
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
from ops.kernels.routed_kernels import backward_keys, backward_queries, forward
from ops.kernels.routed_small_kernels import MAX_WINDOWS, small_backward_keys, small_backward_queries, small_forward
from retinue.utils.arithmetic import ceil_div

# Names of the kernels in `TUNED`.
FORWARD = "routed_attention.forward"
BACKWARD_QUERIES = "routed_attention.backward_queries"
BACKWARD_KEYS = "routed_attention.backward_keys"
SMALL_FORWARD = "routed_attention.small_forward"
SMALL_BACKWARD_QUERIES = "routed_attention.small_backward_queries"
SMALL_BACKWARD_KEYS = "routed_attention.small_backward_keys"

# A window of fewer tokens does not fill the smallest tile.
SMALL_WINDOW = 16

# Maximum number of small windows that a program loads per iteration of its loop: they are the bits of an int32.
MAX_STREAMED_WINDOWS = 32


def configs(tokens: int) -> list[TileConfig]:
    """Return the tile configurations that tuning tries for windows of `tokens` tokens."""
    limits = (16, 32, 64, 128)
    resident_sizes = limits if tokens < SMALL_WINDOW else sorted({padded(tokens, limit) for limit in limits})
    choices = itertools.product(resident_sizes, limits, (1, 2, 4, 8), (1, 2, 3))
    return [TileConfig(*choice) for choice in choices]


def _default_tile_config(kernel: str, x: Tensor, padded_head_dim: int, tokens: int, keys: int) -> TileConfig:
    """Return 64 x 64 tokens for half precision, and smaller tiles where these would need too many registers.

    Tiles are smaller in float32, and for the gradients of keys and values, which take four products.

    Args:
        kernel: name in `TUNED`.
        x: input of the kernel; only its data type matters.
        padded_head_dim: number of channels per head after padding.
        tokens: number of tokens per window, which bounds the resident tile.
        keys: number of keys per query, which bounds the streamed tile.
    """
    if x.dtype == torch.float32:
        streamed = padded(keys, 32 if padded_head_dim <= 32 else 16)
        return TileConfig(padded(tokens, 32), streamed, num_warps=4, num_stages=2)
    resident = padded(tokens, 64)
    streamed = padded(keys, 32 if kernel == BACKWARD_KEYS else 64)
    return TileConfig(resident, streamed, num_warps=4 if resident > 16 else 2, num_stages=2)


def _small(qkv: Tensor, windows_per_image: int) -> bool:
    """Tell whether windows are so small and so few that the kernels of `ops.kernels.routed_small_kernels` run."""
    return qkv.shape[1] * qkv.shape[2] < SMALL_WINDOW * windows_per_image <= SMALL_WINDOW * MAX_WINDOWS.value


def _small_launch_arguments(
    kernel: str, qkv: Tensor, index: Tensor, grid: Sequence[int], num_heads: int
) -> tuple[int, dict[str, Any]]:
    """Return the number of programs of a kernel for small windows, and its arguments for sizes and tiles."""
    (B, windows_per_image, topk), (H, W, channels) = index.shape, qkv.shape[1:]
    D = channels // (3 * num_heads)
    tokens = H * W // windows_per_image
    single_precision = qkv.dtype == torch.float32
    resident = padded(H * W, 32 if single_precision else 64)
    limit = 64
    if single_precision:
        limit = 32 if D <= 32 else 16
    elif kernel == SMALL_BACKWARD_KEYS and D > 32:
        limit = 32
    streamed = padded(min(H * W, MAX_STREAMED_WINDOWS * tokens), limit)
    default = TileConfig(resident, streamed, num_warps=4, num_stages=1)
    config = tile_config(kernel, qkv, padded(D), tokens, default)
    resident_windows = config.resident // tokens
    tiles = ceil_div(windows_per_image, resident_windows)
    arguments: dict[str, Any] = {
        "tiles": tiles,
        "windows_per_image": windows_per_image,
        "topk": topk,
        "num_heads": num_heads,
        "GRID_W": grid[1],
        "WINDOW_H": int(H // grid[0]),
        "WINDOW_W": int(W // grid[1]),
        "D": D,
        "PADDED_D": padded(D),
        "RESIDENT": config.resident,
        "STREAMED": config.streamed,
        "RESIDENT_WINDOWS": int(resident_windows),
        "STREAMED_WINDOWS": int(min(config.streamed // tokens, MAX_STREAMED_WINDOWS)),
        "ROUTES": padded(topk),
        "PRECISION": dot_precision(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return B * num_heads * tiles, arguments


def _launch_arguments(
    kernel: str, qkv: Tensor, index: Tensor, grid: Sequence[int], num_heads: int
) -> tuple[int, dict[str, Any]]:
    """Return the number of programs of a kernel, and its arguments for sizes and tiles."""
    (B, windows_per_image, topk), (H, W, channels) = index.shape, qkv.shape[1:]
    D = channels // (3 * num_heads)
    window_h, window_w = H // grid[0], W // grid[1]
    tokens = window_h * window_w
    default = _default_tile_config(kernel, qkv, padded(D), tokens, topk * tokens)
    config = tile_config(kernel, qkv, padded(D), tokens, default)
    tiles_per_window = ceil_div(tokens, config.resident)
    window_padding = ceil_div(tokens, config.streamed) * config.streamed - tokens
    arguments: dict[str, Any] = {
        "tiles_per_window": tiles_per_window,
        "windows_per_image": windows_per_image,
        "topk": topk,
        "num_heads": num_heads,
        "grid_w": grid[1],
        "window_h": window_h,
        "window_w": window_w,
        "D": D,
        "PADDED_D": padded(D),
        "RESIDENT": config.resident,
        "STREAMED": config.streamed,
        "WINDOW_TILES": bool(4 * window_padding <= tokens),
        "PRECISION": dot_precision(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return B * windows_per_image * num_heads * tiles_per_window, arguments


def _empty_outputs(
    qkv: Tensor, index: Tensor, grid: Sequence[int], num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    B, H, W, channels = qkv.shape
    tokens = (H // grid[0]) * (W // grid[1])
    lse = qkv.new_empty(B, index.shape[1], num_heads, tokens, dtype=torch.float32)
    return qkv.new_empty(B, H, W, channels // 3), lse


@kernel_op("retinue::routed_attention", _empty_outputs)
def routed_attention_and_lse(
    qkv: Tensor, index: Tensor, grid: Sequence[int], num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output of `routed_attention` and the log-sum-exp of each query, which the backward pass needs.

    Args:
        qkv: (B, H, W, 3C): queries, keys and values, with any strides.
        index: (B, P, topk): the windows that each window chose, with any strides.
        grid: number of windows along H and along W.
        num_heads: number of heads.
        scale: factor on the scores before the softmax.

    Returns:
        The output (B, H, W, C), and the logarithm to base 2 of the softmax's denominator, (B, P, heads, tokens of a
        window) in float32.
    """
    qkv, index = qkv.contiguous(), index.contiguous()
    out, lse = _empty_outputs(qkv, index, grid, num_heads, scale)
    if _small(qkv, index.shape[1]):
        num_programs, arguments = _small_launch_arguments(SMALL_FORWARD, qkv, index, grid, num_heads)
        wrap_triton(small_forward)[(num_programs,)](qkv, index, out, lse, scale, **arguments)
        return out, lse
    num_programs, arguments = _launch_arguments(FORWARD, qkv, index, grid, num_heads)
    wrap_triton(forward)[(num_programs,)](qkv, index, out, lse, scale, **arguments)
    return out, lse


def _empty_dqkv(qkv: Tensor, *_) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


@kernel_op("retinue::routed_attention_backward", _empty_dqkv)
def routed_attention_backward(
    qkv: Tensor,
    index: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    grid: Sequence[int],
    num_heads: int,
    scale: float,
) -> Tensor:
    """Return the gradient of `qkv`, (B, H, W, 3C), from the gradient `dout` (B, H, W, C) of the output.

    `out` and `lse` are the results of `routed_attention_and_lse`; the further arguments are its arguments.
    """
    qkv, index, dout = qkv.contiguous(), index.contiguous(), dout.contiguous()
    dqkv, delta = _empty_dqkv(qkv), torch.empty_like(lse)
    B, windows_per_image, _ = index.shape
    if _small(qkv, windows_per_image):
        choosers = torch.empty(B, windows_per_image, dtype=torch.uint64, device=index.device)
        num_programs, arguments = _small_launch_arguments(SMALL_BACKWARD_QUERIES, qkv, index, grid, num_heads)
        wrap_triton(small_backward_queries)[(num_programs,)](
            qkv, index, out, dout, lse, delta, dqkv, choosers, scale, **arguments
        )
        num_programs, arguments = _small_launch_arguments(SMALL_BACKWARD_KEYS, qkv, index, grid, num_heads)
        wrap_triton(small_backward_keys)[(num_programs,)](qkv, dout, lse, delta, dqkv, choosers, scale, **arguments)
        return dqkv

    choosers = torch.empty(B, windows_per_image, windows_per_image, dtype=torch.int32, device=index.device)
    chooser_counts = torch.empty(B, windows_per_image, dtype=torch.int32, device=index.device)

    num_programs, arguments = _launch_arguments(BACKWARD_QUERIES, qkv, index, grid, num_heads)
    wrap_triton(backward_queries)[(num_programs,)](
        qkv, index, out, dout, lse, delta, dqkv, choosers, chooser_counts, scale, **arguments
    )
    num_programs, arguments = _launch_arguments(BACKWARD_KEYS, qkv, index, grid, num_heads)
    wrap_triton(backward_keys)[(num_programs,)](
        qkv, dout, lse, delta, dqkv, choosers, chooser_counts, scale, **arguments
    )
    return dqkv


def _setup_context(ctx, inputs, output) -> None:
    qkv, index, *ctx.settings = inputs
    ctx.save_for_backward(qkv, index, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor, _):
    return routed_attention_backward(*ctx.saved_tensors, dout, *ctx.settings), None, None, None, None


routed_attention_and_lse.register_autograd(_backward, setup_context=_setup_context)
forbid_second_derivative(routed_attention_backward)


@register_flop_formula(torch.ops.retinue.routed_attention)
def _flops(qkv_shape, index_shape, grid, num_heads, scale, *args, **kwargs) -> int:
    """Count two matrix products over all pairs of a query and a key that its window chose."""
    B, H, W, channels = qkv_shape
    keys = index_shape[-1] * (H // grid[0]) * (W // grid[1])
    return 2 * 2 * B * H * W * keys * (channels // 3)


@register_flop_formula(torch.ops.retinue.routed_attention_backward)
def _backward_flops(
    qkv_shape, index_shape, output_shape, lse_shape, dout_shape, grid, num_heads, scale, *args, **kwargs
) -> int:
    """Count the four matrix products of the gradients' definition, without the products that the kernels repeat."""
    return 2 * _flops(qkv_shape, index_shape, grid, num_heads, scale)


def routed_attention(qkv: Tensor, index: Tensor, grid: tuple[int, int], num_heads: int, scale: float) -> Tensor:
    """Compute `ops.functional.routed_attention` by Triton kernels: from (B, H, W, 3C) to (B, H, W, C).

    The caller must have checked that `ops.backend.obstacle_to_kernels(qkv, head_dim)` returns None.
    """
    return routed_attention_and_lse(qkv, index, grid, num_heads, scale)[0]
