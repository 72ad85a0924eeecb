"""Triton kernels of routed attention for small windows, which `ops.kernels.routed_attention` launches.

A tile of a single small window would be mostly padding. Here a tile holds several consecutive windows of the map. The
windows that a window chose are the bits of a word of 64 bits, so a map has at most 64 windows. Every program looks at
all tiles of the map, skips those that hold none of the chosen windows, and masks the other pairs of a query and a key
by the words.

The grid of each kernel has one dimension with B * num_heads * tiles programs. Arguments of the kernels, for B maps of
H x W tokens in P windows each, with C = num_heads * D channels:

    qkv, dqkv                    (B, H, W, 3C), contiguous: queries, keys and values of each token, and their gradients
    index                        (B, P, topk), contiguous: the windows that each window chose
    out, dout                    (B, H, W, C), contiguous: the output and its gradient
    lse                          (B, P, num_heads, WINDOW_H * WINDOW_W), float32: logarithm to base 2 of the softmax's
                                 denominator of each query
    delta                        shaped like lse: sum over channels of out * dout for each query
    choosers                     (B, P), uint64: word of the windows that chose each window
    scale                        factor on the scores; kernels cast it, since TorchInductor passes a float64
    tiles                        number of resident tiles that cover a map
    windows_per_image            P
    topk, num_heads              number of windows that each window chooses, number of heads
    GRID_W                       number of windows along W
    WINDOW_H, WINDOW_W           number of tokens of a window along H and along W
    D, PADDED_D                  number of channels per head, and this number after padding for `tl.arange` and `tl.dot`
    RESIDENT, STREAMED           number of tokens that a program holds, and that it loads per iteration of its loop
    RESIDENT_WINDOWS             number of windows that a program holds
    STREAMED_WINDOWS             number of windows that a program loads per iteration of its loop, at most 32
    ROUTES                       topk after padding for `tl.arange`
    PRECISION                    `input_precision` of `tl.dot`

The sizes of windows are compile-time constants, since divisions by other numbers would take longer than the products.
"""

import triton
import triton.language as tl

from ops.kernels.routed_kernels import rows_in_map
from ops.kernels.rows import LOG2E, LOWEST_SCORE, load_rows, positive_factor, store_rows

# Maximum number of windows of a map: a window is a bit of a word.
MAX_WINDOWS = tl.constexpr(64)

# `_record_choosers` searches the routes of CHOOSERS_BLOCK windows at a time.
CHOOSERS_BLOCK = tl.constexpr(16)


@triton.jit
def _program_indices(tiles, num_heads):
    """Return image, head and tile of this program."""
    program = tl.program_id(0)
    return (program // (tiles * num_heads)).to(tl.int64), program // tiles % num_heads, program % tiles


@triton.jit
def _tile_tokens(
    first_window, windows_per_image, num_heads,
    GRID_W: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, WINDOWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Describe the tokens of a tile with WINDOWS windows, which is padded to SIZE tokens.

    Returns:
        Window, row in the map, offset from the statistic of the image's first token, and validity of each token.
    """
    number, tokens = tl.arange(0, SIZE), WINDOW_H * WINDOW_W
    window = first_window + number // tokens
    row = rows_in_map(window, number % tokens, GRID_W, WINDOW_H, WINDOW_W)
    statistic = window * num_heads * tokens + number % tokens
    return window, row, statistic, (number < WINDOWS * tokens) & (window < windows_per_image)


@triton.jit
def _tile_bits(TOKENS: tl.constexpr, WINDOWS: tl.constexpr, SIZE: tl.constexpr):
    """Return the bit of each token's window in a tile with WINDOWS windows, counted from its first window: int32."""
    number = tl.arange(0, SIZE)
    return tl.where(number < WINDOWS * TOKENS, 1 << (number // TOKENS), 0)


@triton.jit
def _bits(window, valid):
    """Return the bit of each window in a word, uint64; 0 where `valid` is false."""
    return tl.where(valid, tl.full(window.shape, 1, tl.uint64) << window.to(tl.uint64), 0)


@triton.jit
def _chosen_words(routes, window, valid, topk, ROUTES: tl.constexpr):
    """Return the word of the windows that each window chose; 0 where `valid` is false.

    Args:
        routes: pointer to the routes of the image, (P, topk).
        window: (rows,) windows.
        valid: (rows,) False for rows that are not read.
        topk: number of windows that each window chooses.
        ROUTES: topk after padding.
    """
    route = tl.arange(0, ROUTES)
    mask = valid[:, None] & (route < topk)[None, :]
    chosen = tl.load(routes + window[:, None] * topk + route[None, :], mask=mask, other=0)
    return tl.sum(_bits(chosen, mask), 1)


@triton.jit
def _record_choosers(routes, choosers, windows_per_image, topk, ROUTES: tl.constexpr):
    """Store the words of an image in `choosers`, (P,); `routes` is as in `_chosen_words`."""
    window = tl.arange(0, MAX_WINDOWS)
    words = tl.zeros((MAX_WINDOWS,), tl.uint64)
    for first in range(0, windows_per_image, CHOOSERS_BLOCK):
        chooser = first + tl.arange(0, CHOOSERS_BLOCK)
        chosen = _chosen_words(routes, chooser, chooser < windows_per_image, topk, ROUTES)
        chose = (chosen[None, :] >> window[:, None].to(tl.uint64)) & 1
        words += tl.sum(chose << chooser[None, :].to(tl.uint64), 1)
    tl.store(choosers + window, words, mask=window < windows_per_image)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _in_tile(word, first_window, WINDOWS: tl.constexpr):
    """Tell whether a word has the bit of any window of the tile with WINDOWS windows."""
    bits_of_tile = (tl.cast(1, tl.uint64) << WINDOWS) - 1
    return ((word >> tl.cast(first_window, tl.uint64)) & bits_of_tile) != 0


@triton.jit
def small_forward(
    qkv, index, out, lse, scale, tiles, windows_per_image, topk, num_heads,
    GRID_W: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    RESIDENT: tl.constexpr, STREAMED: tl.constexpr, RESIDENT_WINDOWS: tl.constexpr, STREAMED_WINDOWS: tl.constexpr,
    ROUTES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `out` and `lse` of a tile of queries; see the module's docstring for the arguments."""
    scale = tl.cast(scale, tl.float32)
    image, head, tile = _program_indices(tiles, num_heads)  # pyright: ignore[reportGeneralTypeIssues]
    tokens, C = WINDOW_H * WINDOW_W, num_heads * D
    first_token = image * windows_per_image * tokens
    qkv_base = qkv + first_token * 3 * C + head * D

    query_window, query_row, statistic, query_valid = _tile_tokens(  # pyright: ignore[reportGeneralTypeIssues]
        tile * RESIDENT_WINDOWS, windows_per_image, num_heads, GRID_W, WINDOW_H, WINDOW_W, RESIDENT_WINDOWS, RESIDENT
    )
    q, factor = positive_factor(load_rows(qkv_base, query_row, 3 * C, query_valid, D, PADDED_D), scale)  # pyright: ignore[reportGeneralTypeIssues]
    chosen = _chosen_words(index + image * windows_per_image * topk, query_window, query_valid, topk, ROUTES)
    chosen_by_any = tl.reduce(chosen, 0, _either)
    key_bits = _tile_bits(tokens, STREAMED_WINDOWS, STREAMED)

    running_max = tl.full((RESIDENT,), LOWEST_SCORE, tl.float32)
    denominator = tl.zeros((RESIDENT,), tl.float32)
    acc = tl.zeros((RESIDENT, PADDED_D), tl.float32)
    for first in range(0, windows_per_image, STREAMED_WINDOWS):
        if _in_tile(chosen_by_any, first, STREAMED_WINDOWS):
            _, key_row, _, key_valid = _tile_tokens(  # pyright: ignore[reportGeneralTypeIssues]
                first, windows_per_image, num_heads, GRID_W, WINDOW_H, WINDOW_W, STREAMED_WINDOWS, STREAMED
            )
            k = load_rows(qkv_base + C, key_row, 3 * C, key_valid, D, PADDED_D)
            v = load_rows(qkv_base + 2 * C, key_row, 3 * C, key_valid, D, PADDED_D)
            attends = ((chosen >> tl.cast(first, tl.uint64)).to(tl.int32)[:, None] & key_bits[None, :]) != 0
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            products = tl.where(attends, products, float("-inf"))
            new_max = tl.maximum(running_max, tl.max(products, 1) * factor)
            weights = tl.exp2(products * factor - new_max[:, None])
            rescale = tl.exp2(running_max - new_max)
            denominator = denominator * rescale + tl.sum(weights, 1)
            acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            running_max = new_max

    store_rows(out + first_token * C + head * D, query_row, C, query_valid, acc / denominator[:, None], D, PADDED_D)
    lse += first_token * num_heads + head * tokens
    tl.store(lse + statistic, running_max + tl.log2(denominator), mask=query_valid)


@triton.jit
def small_backward_queries(
    qkv, index, out, dout, lse, delta, dqkv, choosers,
    scale, tiles, windows_per_image, topk, num_heads,
    GRID_W: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    RESIDENT: tl.constexpr, STREAMED: tl.constexpr, RESIDENT_WINDOWS: tl.constexpr, STREAMED_WINDOWS: tl.constexpr,
    ROUTES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `delta` and the queries' part of `dqkv` of a tile of queries, with the loop of `small_forward`.

    The program of the first head and the first tile of an image writes the image's row of `choosers`, which
    `small_backward_keys` reads in the next launch.
    """
    scale = tl.cast(scale, tl.float32)
    image, head, tile = _program_indices(tiles, num_heads)  # pyright: ignore[reportGeneralTypeIssues]
    tokens, C = WINDOW_H * WINDOW_W, num_heads * D
    first_token = image * windows_per_image * tokens
    qkv_base = qkv + first_token * 3 * C + head * D
    out_offset, statistics = first_token * C + head * D, first_token * num_heads + head * tokens

    query_window, query_row, statistic, query_valid = _tile_tokens(  # pyright: ignore[reportGeneralTypeIssues]
        tile * RESIDENT_WINDOWS, windows_per_image, num_heads, GRID_W, WINDOW_H, WINDOW_W, RESIDENT_WINDOWS, RESIDENT
    )
    q = load_rows(qkv_base, query_row, 3 * C, query_valid, D, PADDED_D)
    do = load_rows(dout + out_offset, query_row, C, query_valid, D, PADDED_D)
    o = load_rows(out + out_offset, query_row, C, query_valid, D, PADDED_D)
    query_lse = tl.load(lse + statistics + statistic, mask=query_valid, other=0.0)
    query_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + statistics + statistic, query_delta, mask=query_valid)
    routes = index + image * windows_per_image * topk
    if (head == 0) & (tile == 0):
        _record_choosers(routes, choosers + image * windows_per_image, windows_per_image, topk, ROUTES)
    chosen = _chosen_words(routes, query_window, query_valid, topk, ROUTES)
    chosen_by_any = tl.reduce(chosen, 0, _either)
    key_bits = _tile_bits(tokens, STREAMED_WINDOWS, STREAMED)

    dq = tl.zeros((RESIDENT, PADDED_D), tl.float32)
    for first in range(0, windows_per_image, STREAMED_WINDOWS):
        if _in_tile(chosen_by_any, first, STREAMED_WINDOWS):
            _, key_row, _, key_valid = _tile_tokens(  # pyright: ignore[reportGeneralTypeIssues]
                first, windows_per_image, num_heads, GRID_W, WINDOW_H, WINDOW_W, STREAMED_WINDOWS, STREAMED
            )
            k = load_rows(qkv_base + C, key_row, 3 * C, key_valid, D, PADDED_D)
            v = load_rows(qkv_base + 2 * C, key_row, 3 * C, key_valid, D, PADDED_D)
            attends = ((chosen >> tl.cast(first, tl.uint64)).to(tl.int32)[:, None] & key_bits[None, :]) != 0
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            weights = tl.where(attends, tl.exp2(scores - query_lse[:, None]), 0.0)
            dscores = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - query_delta[:, None])
            dq += tl.dot(dscores.to(k.dtype), k, input_precision=PRECISION)

    dqkv_base = dqkv + first_token * 3 * C + head * D
    store_rows(dqkv_base, query_row, 3 * C, query_valid, dq * scale, D, PADDED_D)


@triton.jit
def small_backward_keys(
    qkv, dout, lse, delta, dqkv, choosers,
    scale, tiles, windows_per_image, topk, num_heads,
    GRID_W: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    RESIDENT: tl.constexpr, STREAMED: tl.constexpr, RESIDENT_WINDOWS: tl.constexpr, STREAMED_WINDOWS: tl.constexpr,
    ROUTES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the keys' and the values' parts of `dqkv` of a tile of keys; they are 0 for a window that none chose.

    The kernel reads `delta`, which `small_backward_queries` has written.
    """
    scale = tl.cast(scale, tl.float32)
    image, head, tile = _program_indices(tiles, num_heads)  # pyright: ignore[reportGeneralTypeIssues]
    tokens, C = WINDOW_H * WINDOW_W, num_heads * D
    first_token = image * windows_per_image * tokens
    qkv_base = qkv + first_token * 3 * C + head * D
    dout_base, statistics = dout + first_token * C + head * D, first_token * num_heads + head * tokens

    key_window, key_row, _statistic, key_valid = _tile_tokens(  # pyright: ignore[reportGeneralTypeIssues]
        tile * RESIDENT_WINDOWS, windows_per_image, num_heads, GRID_W, WINDOW_H, WINDOW_W, RESIDENT_WINDOWS, RESIDENT
    )
    k = load_rows(qkv_base + C, key_row, 3 * C, key_valid, D, PADDED_D)
    v = load_rows(qkv_base + 2 * C, key_row, 3 * C, key_valid, D, PADDED_D)
    key_choosers = tl.load(choosers + image * windows_per_image + key_window, mask=key_valid, other=0)
    choosers_of_any = tl.reduce(key_choosers, 0, _either)
    query_bits = _tile_bits(tokens, STREAMED_WINDOWS, STREAMED)

    dk = tl.zeros((RESIDENT, PADDED_D), tl.float32)
    dv = tl.zeros((RESIDENT, PADDED_D), tl.float32)
    for first in range(0, windows_per_image, STREAMED_WINDOWS):
        if _in_tile(choosers_of_any, first, STREAMED_WINDOWS):
            _, query_row, statistic, query_valid = _tile_tokens(  # pyright: ignore[reportGeneralTypeIssues]
                first, windows_per_image, num_heads, GRID_W, WINDOW_H, WINDOW_W, STREAMED_WINDOWS, STREAMED
            )
            q = load_rows(qkv_base, query_row, 3 * C, query_valid, D, PADDED_D)
            do = load_rows(dout_base, query_row, C, query_valid, D, PADDED_D)
            query_lse = tl.load(lse + statistics + statistic, mask=query_valid, other=0.0)
            query_delta = tl.load(delta + statistics + statistic, mask=query_valid, other=0.0)
            attends = ((key_choosers >> tl.cast(first, tl.uint64)).to(tl.int32)[:, None] & query_bits[None, :]) != 0
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
            weights = tl.where(attends, tl.exp2(scores - query_lse[None, :]), 0.0)
            dv += tl.dot(weights.to(do.dtype), do, input_precision=PRECISION)
            dscores = weights * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - query_delta[None, :])
            dk += tl.dot(dscores.to(q.dtype), q, input_precision=PRECISION)

    dqkv_base = dqkv + first_token * 3 * C + head * D
    store_rows(dqkv_base + C, key_row, 3 * C, key_valid, dk * scale, D, PADDED_D)
    store_rows(dqkv_base + 2 * C, key_row, 3 * C, key_valid, dv, D, PADDED_D)
