"""Triton kernels of `ops.functional.routed_attention`, bi-level routing (Zhu et al., CVPR 2023, arXiv:2303.08810).

Keys and values are read where they lie in the map, window by window as routed, under the online softmax of
FlashAttention (Dao et al., 2022, arXiv:2205.14135), so that nothing is gathered in memory. Three kernels:

- forward: a program holds some queries of one window and head, and loops over the keys that they are routed to;
- queries' gradient: the same loop; also notes which windows chose each window, in two small tables (that costs no
  launch, where sorting the routes takes about ten);
- keys' and values' gradients: a program holds some keys of one window and head, and loops over the queries that chose
  them, always in the same order: no atomics, and the same bits in every run.

The tiles are chosen by the compiler's figures for compute capability 8.0 and 9.0 (registers, spills, shared memory),
not timed on a GPU.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ops.kernels.launch import Tiles, dot_precision, forbid_second_derivative, kernel_op, padded, tiles, wrap_triton
from ops.kernels.rows import LOG2E, load_rows, store_rows

FORWARD, BACKWARD_QUERIES, BACKWARD_KEYS = (  # keys of `TUNED`
    f"routed_attention.{kernel}" for kernel in ("forward", "backward_queries", "backward_keys")
)
CHUNK = tl.constexpr(16)  # windows, and routes of each, that are searched at a time


@triton.jit
def _place(blocks, heads, windows):
    """Image, window, head and block of a program: neighbours share keys and values, so that these stay in cache."""
    program = tl.program_id(0)
    image = program // (blocks * heads * windows)
    window = program // (blocks * heads) % windows
    return image.to(tl.int64), window, program // blocks % heads, program % blocks


@triton.jit
def _rows(window, token, grid_width, window_height, window_width):
    """Where the tokens of windows lie in the map, row by row."""
    y = window // grid_width * window_height + token // window_width
    x = window % grid_width * window_width + token % window_width
    return (y * (grid_width * window_width) + x).to(tl.int64)


@triton.jit
def _forward(
    qkv, index, out, lse, scale, blocks, windows, topk, heads, grid_width, window_height, window_width,
    D: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, window, head, block = _place(blocks, heads, windows)  # pyright: ignore[reportGeneralTypeIssues]
    tokens = window_height * window_width
    C = heads * D
    start = qkv + image * windows * tokens * 3 * C + head * D

    token = block * OWN + tl.arange(0, OWN)
    own = token < tokens
    row = _rows(window, token, grid_width, window_height, window_width)
    q = load_rows(start, row, 3 * C, own, D, WIDTH)
    routes = index + (image * windows + window) * topk

    highest = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    acc = tl.zeros((OWN, WIDTH), tl.float32)
    for first in range(0, topk * tokens, OTHER):
        j = first + tl.arange(0, OTHER)
        other = j < topk * tokens
        chosen = tl.load(routes + j // tokens, mask=other, other=0).to(tl.int32)
        key = _rows(chosen, j % tokens, grid_width, window_height, window_width)
        k = load_rows(start + C, key, 3 * C, other, D, WIDTH)
        v = load_rows(start + 2 * C, key, 3 * C, other, D, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where(other[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        highest = higher

    store_rows(out + image * windows * tokens * C + head * D, row, C, own, acc / total[:, None], D, WIDTH)
    tl.store(lse + ((image * windows + window) * heads + head) * tokens + token, highest + tl.log2(total), mask=own)


@triton.jit
def _note_choosers(index, choosers, count, window, windows, topk):
    """Write which windows of an image chose `window`, in ascending order, and how many they are."""
    noted = 0
    for first in range(0, windows, CHUNK):
        chooser = first + tl.arange(0, CHUNK)
        chose = tl.zeros((CHUNK,), tl.int32)
        for slot in range(0, topk, CHUNK):
            k = slot + tl.arange(0, CHUNK)
            there = (chooser < windows)[:, None] & (k < topk)[None, :]
            routes = tl.load(index + chooser[:, None] * topk + k[None, :], mask=there, other=-1)
            chose = tl.maximum(chose, tl.max((routes == window).to(tl.int32), 1))
        tl.store(choosers + noted + tl.cumsum(chose, 0) - 1, chooser, mask=chose > 0)
        noted += tl.sum(chose, 0)
    tl.store(count, noted)


@triton.jit
def _backward_queries(
    qkv, index, out, dout, lse, delta, dqkv, choosers, count,
    scale, blocks, windows, topk, heads, grid_width, window_height, window_width,
    D: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, window, head, block = _place(blocks, heads, windows)  # pyright: ignore[reportGeneralTypeIssues]
    place = image * windows + window
    if (head == 0) & (block == 0):
        _note_choosers(index + image * windows * topk, choosers + place * windows, count + place, window, windows, topk)
    tokens = window_height * window_width
    C = heads * D
    start = qkv + image * windows * tokens * 3 * C + head * D
    start_out = image * windows * tokens * C + head * D

    token = block * OWN + tl.arange(0, OWN)
    own = token < tokens
    row = _rows(window, token, grid_width, window_height, window_width)
    q = load_rows(start, row, 3 * C, own, D, WIDTH)
    do = load_rows(dout + start_out, row, C, own, D, WIDTH)
    o = load_rows(out + start_out, row, C, own, D, WIDTH)
    statistic = (place * heads + head) * tokens + token
    own_lse = tl.load(lse + statistic, mask=own, other=0.0)
    own_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + statistic, own_delta, mask=own)

    routes = index + place * topk
    dq = tl.zeros((OWN, WIDTH), tl.float32)
    for first in range(0, topk * tokens, OTHER):
        j = first + tl.arange(0, OTHER)
        other = j < topk * tokens
        chosen = tl.load(routes + j // tokens, mask=other, other=0).to(tl.int32)
        key = _rows(chosen, j % tokens, grid_width, window_height, window_width)
        k = load_rows(start + C, key, 3 * C, other, D, WIDTH)
        v = load_rows(start + 2 * C, key, 3 * C, other, D, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.where(other[None, :], tl.exp2(scores - own_lse[:, None]), 0.0)
        dscores = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - own_delta[:, None])
        dq += tl.dot(dscores.to(k.dtype), k, input_precision=PRECISION)

    store_rows(dqkv + image * windows * tokens * 3 * C + head * D, row, 3 * C, own, dq * scale, D, WIDTH)


@triton.jit
def _backward_keys(
    qkv, dout, lse, delta, dqkv, choosers, count,
    scale, blocks, windows, topk, heads, grid_width, window_height, window_width,
    D: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, window, head, block = _place(blocks, heads, windows)  # pyright: ignore[reportGeneralTypeIssues]
    place = image * windows + window
    tokens = window_height * window_width
    C = heads * D
    start = qkv + image * windows * tokens * 3 * C + head * D
    start_out = dout + image * windows * tokens * C + head * D

    token = block * OWN + tl.arange(0, OWN)
    own = token < tokens
    row = _rows(window, token, grid_width, window_height, window_width)
    k = load_rows(start + C, row, 3 * C, own, D, WIDTH)
    v = load_rows(start + 2 * C, row, 3 * C, own, D, WIDTH)

    dk = tl.zeros((OWN, WIDTH), tl.float32)
    dv = tl.zeros((OWN, WIDTH), tl.float32)
    queries = tl.load(count + place) * tokens
    for first in range(0, queries, OTHER):
        i = first + tl.arange(0, OTHER)
        other = i < queries
        chooser = tl.load(choosers + place * windows + i // tokens, mask=other, other=0)
        query = _rows(chooser, i % tokens, grid_width, window_height, window_width)
        q = load_rows(start, query, 3 * C, other, D, WIDTH)
        do = load_rows(start_out, query, C, other, D, WIDTH)
        statistic = ((image * windows + chooser) * heads + head) * tokens + i % tokens
        other_lse = tl.load(lse + statistic, mask=other, other=0.0)
        other_delta = tl.load(delta + statistic, mask=other, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.exp2(scores - other_lse[None, :])  # 1 beyond the queries, where `do` and `other_delta` are 0
        dv += tl.dot(weights.to(do.dtype), do, input_precision=PRECISION)
        dscores = weights * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - other_delta[None, :])
        dk += tl.dot(dscores.to(q.dtype), q, input_precision=PRECISION)

    start_grad = dqkv + image * windows * tokens * 3 * C + head * D
    store_rows(start_grad + C, row, 3 * C, own, dk * scale, D, WIDTH)
    store_rows(start_grad + 2 * C, row, 3 * C, own, dv, D, WIDTH)


def configs(tokens: int) -> list[Tiles]:
    """Candidates for `TUNED`: tiles for windows of so many tokens."""
    owned = sorted({padded(tokens, most) for most in (16, 32, 64, 128)})
    others, warps, stages = (16, 32, 64, 128), (1, 2, 4, 8), (1, 2, 3)
    return [Tiles(*choice) for choice in itertools.product(owned, others, warps, stages)]


def _default_tiles(kernel: str, x: Tensor, width: int, tokens: int, others: int) -> Tiles:
    """64 x 64 in half precision, less where registers would not suffice: in float32, and for keys' four products."""
    if x.dtype == torch.float32:
        return Tiles(padded(tokens, 32), padded(others, 32 if width <= 32 else 16), num_warps=4, num_stages=2)
    own = padded(tokens, 64)
    return Tiles(own, padded(others, 32 if kernel == BACKWARD_KEYS else 64), 4 if own > 16 else 2, num_stages=2)


def _launch(kernel: str, qkv: Tensor, index: Tensor, grid: Sequence[int], num_heads: int) -> tuple[int, dict[str, Any]]:
    """The number of programs of a kernel, and what it is told of sizes and tiles."""
    (B, windows, topk), (H, W, channels) = index.shape, qkv.shape[1:]
    D = channels // (3 * num_heads)
    height, width = H // grid[0], W // grid[1]
    tokens = height * width
    default = _default_tiles(kernel, qkv, padded(D), tokens, topk * tokens)
    chosen = tiles(kernel, qkv, padded(D), tokens, default)
    blocks = -(-tokens // chosen.own)
    arguments: dict[str, Any] = {
        "blocks": blocks,
        "windows": windows,
        "topk": topk,
        "heads": num_heads,
        "grid_width": grid[1],
        "window_height": height,
        "window_width": width,
        "D": D,
        "WIDTH": padded(D),
        "OWN": chosen.own,
        "OTHER": chosen.other,
        "PRECISION": dot_precision(),
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
    }
    return B * windows * num_heads * blocks, arguments


def _empty_outputs(qkv: Tensor, index: Tensor, grid: Sequence[int], num_heads: int, scale: float):
    B, H, W, channels = qkv.shape
    tokens = (H // grid[0]) * (W // grid[1])
    lse = qkv.new_empty(B, index.shape[1], num_heads, tokens, dtype=torch.float32)
    return qkv.new_empty(B, H, W, channels // 3), lse


@kernel_op("retinue::routed_attention", _empty_outputs)
def routed_attention_and_lse(
    qkv: Tensor, index: Tensor, grid: Sequence[int], num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`routed_attention`, and of each query the logarithm to base 2 of the softmax's denominator."""
    qkv, index = qkv.contiguous(), index.contiguous()
    out, lse = _empty_outputs(qkv, index, grid, num_heads, scale)
    programs, arguments = _launch(FORWARD, qkv, index, grid, num_heads)
    wrap_triton(_forward)[(programs,)](qkv, index, out, lse, scale, **arguments)
    return out, lse


def _empty_dqkv(qkv: Tensor, *others) -> Tensor:
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
    """The gradient of `qkv`."""
    qkv, index, dout = qkv.contiguous(), index.contiguous(), dout.contiguous()
    dqkv, delta = _empty_dqkv(qkv), torch.empty_like(lse)
    B, windows, _ = index.shape
    choosers = torch.empty(B, windows, windows, dtype=torch.int32, device=index.device)
    count = torch.empty(B, windows, dtype=torch.int32, device=index.device)

    programs, arguments = _launch(BACKWARD_QUERIES, qkv, index, grid, num_heads)
    wrap_triton(_backward_queries)[(programs,)](
        qkv, index, out, dout, lse, delta, dqkv, choosers, count, scale, **arguments
    )
    programs, arguments = _launch(BACKWARD_KEYS, qkv, index, grid, num_heads)
    wrap_triton(_backward_keys)[(programs,)](qkv, dout, lse, delta, dqkv, choosers, count, scale, **arguments)
    return dqkv


def _setup_context(ctx, inputs, output) -> None:
    qkv, index, *ctx.others = inputs
    ctx.save_for_backward(qkv, index, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor, _):
    return routed_attention_backward(*ctx.saved_tensors, dout, *ctx.others), None, None, None, None


routed_attention_and_lse.register_autograd(_backward, setup_context=_setup_context)
forbid_second_derivative(routed_attention_backward)


@register_flop_formula(torch.ops.retinue.routed_attention)
def _flops(qkv_shape, index_shape, grid, num_heads, scale, *args, **kwargs) -> int:
    """Of two products of matrices over the pairs of query and key that are routed to each other."""
    B, H, W, channels = qkv_shape
    keys = index_shape[-1] * (H // grid[0]) * (W // grid[1])
    return 2 * 2 * B * H * W * keys * (channels // 3)


@register_flop_formula(torch.ops.retinue.routed_attention_backward)
def _backward_flops(qkv_shape, index_shape, o_shape, lse_shape, dout_shape, grid, num_heads, scale, *args, **kwargs):
    """Of the four products by definition; those that the kernels repeat are not counted."""
    return 2 * _flops(qkv_shape, index_shape, grid, num_heads, scale)


def routed_attention(qkv: Tensor, index: Tensor, grid: tuple[int, int], num_heads: int, scale: float) -> Tensor:
    """`ops.functional.routed_attention`, for what `ops.backend.obstacle_to_kernels` finds nothing against."""
    return routed_attention_and_lse(qkv, index, grid, num_heads, scale)[0]
