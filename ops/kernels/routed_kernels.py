"""Triton kernels of routed attention, which `ops.kernels.routed_attention` launches.

The grid of each kernel has one dimension with B * P * num_heads * tiles_per_window programs. Arguments of the kernels,
for B maps of H x W tokens in P windows each, with C = num_heads * D channels:

    qkv, dqkv                    (B, H, W, 3C), contiguous: queries, keys and values of each token, and their gradients
    index                        (B, P, topk), contiguous: the windows that each window chose
    out, dout                    (B, H, W, C), contiguous: the output and its gradient
    lse                          (B, P, num_heads, window_h * window_w), float32: logarithm to base 2 of the softmax's
                                 denominator of each query
    delta                        shaped like lse: sum over channels of out * dout for each query
    choosers                     (B, P, P), int32: row p begins with the windows that chose window p, in ascending order
    chooser_counts               (B, P), int32: number of windows that chose each window
    scale                        factor on the scores; kernels cast it, since TorchInductor passes a float64
    tiles_per_window             number of resident tiles that cover a window
    windows_per_image            P
    topk, num_heads              number of windows that each window chooses, number of heads
    grid_w                       number of windows along W
    window_h, window_w           number of tokens of a window along H and along W
    D, PADDED_D                  number of channels per head, and this number after padding for `tl.arange` and `tl.dot`
    RESIDENT, STREAMED           number of tokens that a program holds, and that it loads per iteration of its loop
    WINDOW_TILES                 each tile of streamed tokens belongs to a single window
    PRECISION                    `input_precision` of `tl.dot`
"""

import triton
import triton.language as tl

from ops.kernels.rows import LOG2E, load_rows, positive_factor, store_rows

# `_record_choosers` searches blocks of SEARCH_BLOCK windows x SEARCH_BLOCK routes.
SEARCH_BLOCK = tl.constexpr(16)


@triton.jit
def _program_indices(tiles_per_window, num_heads, windows_per_image):
    """Return image, window, head and tile of this program.

    Heads and tiles vary fastest, so consecutive programs read keys and values of the same windows from the cache.
    """
    program = tl.program_id(0)
    image = program // (tiles_per_window * num_heads * windows_per_image)
    window = program // (tiles_per_window * num_heads) % windows_per_image
    return image.to(tl.int64), window, program // tiles_per_window % num_heads, program % tiles_per_window


@triton.jit
def rows_in_map(window, token, grid_w, window_h, window_w):
    """Return the row-major index in the map, y * W + x, of tokens that are numbered row by row inside their windows."""
    y = window // grid_w * window_h + token // window_w
    x = window % grid_w * window_w + token % window_w
    return (y * (grid_w * window_w) + x).to(tl.int64)


@triton.jit
def _num_steps(count, tokens, STREAMED: tl.constexpr, WINDOW_TILES: tl.constexpr):
    """Return the number of tiles of STREAMED tokens that cover `count` windows of `tokens` tokens."""
    return count * tl.cdiv(tokens, STREAMED) if WINDOW_TILES else tl.cdiv(count * tokens, STREAMED)


@triton.jit
def _streamed_tokens(
    windows, step, count, grid_w, window_h, window_w, STREAMED: tl.constexpr, WINDOW_TILES: tl.constexpr
):  # fmt: skip
    """Describe the tokens of a tile of the windows of a list.

    Args:
        windows: pointer to the list.
        step: number of the tile.
        count: length of the list.
        grid_w: number of windows along W.
        window_h: number of tokens of a window along H.
        window_w: number of tokens of a window along W.
        STREAMED: number of tokens of a tile.
        WINDOW_TILES: each tile belongs to a single window.

    Returns:
        Window, number in the window, row in the map and validity of each token.
    """
    tokens = window_h * window_w
    if WINDOW_TILES:
        # There is a single window and a single quotient, where the other form has one for each token.
        tiles = tl.cdiv(tokens, STREAMED)
        window = tl.load(windows + step // tiles).to(tl.int32)
        token = step % tiles * STREAMED + tl.arange(0, STREAMED)
        valid = token < tokens
    else:
        number = step * STREAMED + tl.arange(0, STREAMED)
        valid = number < count * tokens
        window = tl.load(windows + number // tokens, mask=valid, other=0).to(tl.int32)
        token = number % tokens
    return window, token, rows_in_map(window, token, grid_w, window_h, window_w), valid


@triton.jit
def forward(
    qkv, index, out, lse, scale, tiles_per_window, windows_per_image, topk, num_heads, grid_w, window_h, window_w,
    D: tl.constexpr, PADDED_D: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr,
    WINDOW_TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `out` and `lse` of a tile of queries; see the module's docstring for the arguments."""
    scale = tl.cast(scale, tl.float32)
    image, window, head, tile = _program_indices(tiles_per_window, num_heads, windows_per_image)  # pyright: ignore[reportGeneralTypeIssues]
    tokens = window_h * window_w
    C = num_heads * D
    qkv_base = qkv + image * windows_per_image * tokens * 3 * C + head * D

    query = tile * RESIDENT + tl.arange(0, RESIDENT)
    query_valid = query < tokens
    query_row = rows_in_map(window, query, grid_w, window_h, window_w)
    q, factor = positive_factor(load_rows(qkv_base, query_row, 3 * C, query_valid, D, PADDED_D), scale)  # pyright: ignore[reportGeneralTypeIssues]
    routes = index + (image * windows_per_image + window) * topk

    running_max = tl.full((RESIDENT,), float("-inf"), tl.float32)
    denominator = tl.zeros((RESIDENT,), tl.float32)
    acc = tl.zeros((RESIDENT, PADDED_D), tl.float32)
    for step in range(_num_steps(topk, tokens, STREAMED, WINDOW_TILES)):
        _, _, key_row, key_valid = _streamed_tokens(  # pyright: ignore[reportGeneralTypeIssues]
            routes, step, topk, grid_w, window_h, window_w, STREAMED, WINDOW_TILES
        )
        k = load_rows(qkv_base + C, key_row, 3 * C, key_valid, D, PADDED_D)
        v = load_rows(qkv_base + 2 * C, key_row, 3 * C, key_valid, D, PADDED_D)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        products = tl.where(key_valid[None, :], products, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(products, 1) * factor)
        weights = tl.exp2(products * factor - new_max[:, None])
        rescale = tl.exp2(running_max - new_max)
        denominator = denominator * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        running_max = new_max

    out_base = out + image * windows_per_image * tokens * C + head * D
    store_rows(out_base, query_row, C, query_valid, acc / denominator[:, None], D, PADDED_D)
    statistic = ((image * windows_per_image + window) * num_heads + head) * tokens + query
    tl.store(lse + statistic, running_max + tl.log2(denominator), mask=query_valid)


@triton.jit
def _record_choosers(index, choosers, chooser_count, window, windows_per_image, topk):
    """Store which windows of one image chose `window`, in ascending order, and their number.

    Args:
        index: pointer to the routes of the image, (P, topk).
        choosers: pointer to the list of `window`, (P,); entries beyond the number of choosers are not written.
        chooser_count: pointer to the number of windows that chose `window`.
        window: the window to search for.
        windows_per_image: P.
        topk: number of windows that each window chooses.
    """
    stored = 0
    for first_window in range(0, windows_per_image, SEARCH_BLOCK):
        chooser = first_window + tl.arange(0, SEARCH_BLOCK)
        chose = tl.zeros((SEARCH_BLOCK,), tl.int32)
        for first_route in range(0, topk, SEARCH_BLOCK):
            route = first_route + tl.arange(0, SEARCH_BLOCK)
            valid = (chooser < windows_per_image)[:, None] & (route < topk)[None, :]
            chosen = tl.load(index + chooser[:, None] * topk + route[None, :], mask=valid, other=-1)
            chose = tl.maximum(chose, tl.max((chosen == window).to(tl.int32), 1))
        tl.store(choosers + stored + tl.cumsum(chose, 0) - 1, chooser, mask=chose > 0)
        stored += tl.sum(chose, 0)
    tl.store(chooser_count, stored)


@triton.jit
def backward_queries(
    qkv, index, out, dout, lse, delta, dqkv, choosers, chooser_counts,
    scale, tiles_per_window, windows_per_image, topk, num_heads, grid_w, window_h, window_w,
    D: tl.constexpr, PADDED_D: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr,
    WINDOW_TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `delta` and the queries' part of `dqkv` of a tile of queries, and the tables of choosers.

    The program of the first head and the first tile of a window writes the window's row of `choosers`, which
    `backward_keys` reads in the next launch.
    """
    scale = tl.cast(scale, tl.float32)
    image, window, head, tile = _program_indices(tiles_per_window, num_heads, windows_per_image)  # pyright: ignore[reportGeneralTypeIssues]
    batch_window = image * windows_per_image + window
    if (head == 0) & (tile == 0):
        image_routes = index + image * windows_per_image * topk
        list_of_window = choosers + batch_window * windows_per_image
        _record_choosers(image_routes, list_of_window, chooser_counts + batch_window, window, windows_per_image, topk)
    tokens = window_h * window_w
    C = num_heads * D
    qkv_base = qkv + image * windows_per_image * tokens * 3 * C + head * D
    out_offset = image * windows_per_image * tokens * C + head * D

    query = tile * RESIDENT + tl.arange(0, RESIDENT)
    query_valid = query < tokens
    query_row = rows_in_map(window, query, grid_w, window_h, window_w)
    q = load_rows(qkv_base, query_row, 3 * C, query_valid, D, PADDED_D)
    do = load_rows(dout + out_offset, query_row, C, query_valid, D, PADDED_D)
    o = load_rows(out + out_offset, query_row, C, query_valid, D, PADDED_D)
    statistic = (batch_window * num_heads + head) * tokens + query
    query_lse = tl.load(lse + statistic, mask=query_valid, other=0.0)
    query_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + statistic, query_delta, mask=query_valid)

    routes = index + batch_window * topk
    dq = tl.zeros((RESIDENT, PADDED_D), tl.float32)
    for step in range(_num_steps(topk, tokens, STREAMED, WINDOW_TILES)):
        _, _, key_row, key_valid = _streamed_tokens(  # pyright: ignore[reportGeneralTypeIssues]
            routes, step, topk, grid_w, window_h, window_w, STREAMED, WINDOW_TILES
        )
        k = load_rows(qkv_base + C, key_row, 3 * C, key_valid, D, PADDED_D)
        v = load_rows(qkv_base + 2 * C, key_row, 3 * C, key_valid, D, PADDED_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.where(key_valid[None, :], tl.exp2(scores - query_lse[:, None]), 0.0)
        dscores = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - query_delta[:, None])
        dq += tl.dot(dscores.to(k.dtype), k, input_precision=PRECISION)

    dqkv_base = dqkv + image * windows_per_image * tokens * 3 * C + head * D
    store_rows(dqkv_base, query_row, 3 * C, query_valid, dq * scale, D, PADDED_D)


@triton.jit
def backward_keys(
    qkv, dout, lse, delta, dqkv, choosers, chooser_counts,
    scale, tiles_per_window, windows_per_image, topk, num_heads, grid_w, window_h, window_w,
    D: tl.constexpr, PADDED_D: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr,
    WINDOW_TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the keys' and the values' parts of `dqkv` of a tile of keys; they are 0 for a window that none chose."""
    scale = tl.cast(scale, tl.float32)
    image, window, head, tile = _program_indices(tiles_per_window, num_heads, windows_per_image)  # pyright: ignore[reportGeneralTypeIssues]
    batch_window = image * windows_per_image + window
    tokens = window_h * window_w
    C = num_heads * D
    qkv_base = qkv + image * windows_per_image * tokens * 3 * C + head * D
    dout_base = dout + image * windows_per_image * tokens * C + head * D

    key = tile * RESIDENT + tl.arange(0, RESIDENT)
    key_valid = key < tokens
    key_row = rows_in_map(window, key, grid_w, window_h, window_w)
    k = load_rows(qkv_base + C, key_row, 3 * C, key_valid, D, PADDED_D)
    v = load_rows(qkv_base + 2 * C, key_row, 3 * C, key_valid, D, PADDED_D)

    dk = tl.zeros((RESIDENT, PADDED_D), tl.float32)
    dv = tl.zeros((RESIDENT, PADDED_D), tl.float32)
    list_of_window, count = choosers + batch_window * windows_per_image, tl.load(chooser_counts + batch_window)
    for step in range(_num_steps(count, tokens, STREAMED, WINDOW_TILES)):
        query_window, token, query_row, query_valid = _streamed_tokens(  # pyright: ignore[reportGeneralTypeIssues]
            list_of_window, step, count, grid_w, window_h, window_w, STREAMED, WINDOW_TILES
        )
        q = load_rows(qkv_base, query_row, 3 * C, query_valid, D, PADDED_D)
        do = load_rows(dout_base, query_row, C, query_valid, D, PADDED_D)
        statistic = ((image * windows_per_image + query_window) * num_heads + head) * tokens + token
        query_lse = tl.load(lse + statistic, mask=query_valid, other=0.0)
        query_delta = tl.load(delta + statistic, mask=query_valid, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        # Weights need no mask: they are 1 for queries that are not valid, but add nothing, since `do`, `q` and
        # `query_delta` are 0 there.
        weights = tl.exp2(scores - query_lse[None, :])
        dv += tl.dot(weights.to(do.dtype), do, input_precision=PRECISION)
        dscores = weights * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - query_delta[None, :])
        dk += tl.dot(dscores.to(q.dtype), q, input_precision=PRECISION)

    dqkv_base = dqkv + image * windows_per_image * tokens * 3 * C + head * D
    store_rows(dqkv_base + C, key_row, 3 * C, key_valid, dk * scale, D, PADDED_D)
    store_rows(dqkv_base + 2 * C, key_row, 3 * C, key_valid, dv, D, PADDED_D)
