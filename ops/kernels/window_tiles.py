"""Triton kernels of window attention, which `ops.kernels.window_attention` launches.

All kernels take the map's tokens as rows and are told alike: queries, keys and values of a token are `part` apart, and
tokens `stride`; windows of the whole batch have HEIGHT x WIDTH tokens and are a grid's groups if GRID; heads have D
channels, padded to LANES; a head's bias is stored as PADDED x PADDED; statistics of queries are (tokens, heads).
"""

import triton
import triton.language as tl

from ops.kernels.rows import LOG2E, load_rows, store_rows

LOWEST = tl.constexpr(-1e30)  # below all scores, and finite: a tile may be masked whole


@triton.jit
def _place(blocks, heads):
    """Window, head and block of a program: neighbours share cache lines of tokens."""
    program = tl.program_id(0)
    return program // (blocks * heads), program // blocks % heads, program % blocks


@triton.jit
def _rows(
    window, token, H, W, shift_y, shift_x,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GRID: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Where tokens of a window of the batch lie among all its tokens, and from which side of the map they were rolled.

    Those beyond the window are where its last one is, so that they see something.
    """
    token = tl.minimum(token, HEIGHT * WIDTH - 1)
    rows, columns = H // HEIGHT, W // WIDTH
    image = window // (rows * columns)
    row, column = window // columns % rows, window % columns
    if GRID:
        y, x = token // WIDTH * rows + row, token % WIDTH * columns + column
    else:
        y, x = row * HEIGHT + token // WIDTH, column * WIDTH + token % WIDTH
    side = tl.zeros_like(token)
    if SHIFTED:
        side = (y >= H - shift_y).to(tl.int32) * 2 + (x >= W - shift_x).to(tl.int32)
        y, x = (y + shift_y) % H, (x + shift_x) % W
    return (image * (H * W) + y * W + x).to(tl.int64), side


@triton.jit
def _bias_between(bias, query, key, PADDED: tl.constexpr, BIASED: tl.constexpr):
    """What is added to scores to base 2 of tokens `query` for tokens `key`: (queries, keys), or 0."""
    return tl.load(bias + query[:, None] * PADDED + key[None, :]).to(tl.float32) * LOG2E if BIASED else 0.0


@triton.jit
def _scores(
    q, k, between, query_side, key, key_side, scale,
    N: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores to base 2: (queries, keys)."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + between
    seen = (key < N)[None, :]
    if SHIFTED:
        seen = seen & (query_side[:, None] == key_side[None, :])
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def forward(
    qkv, bias, out, lse, scale, stride, part, blocks, heads, H, W, shift_y, shift_x,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GRID: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr,
    D: tl.constexpr, LANES: tl.constexpr, PADDED: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    PRECISION: tl.constexpr, KEEP_LSE: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = HEIGHT * WIDTH
    window, head, block = _place(blocks, heads)  # pyright: ignore[reportGeneralTypeIssues]
    qkv += head * D
    bias += head * PADDED * PADDED

    query = block * OWN + tl.arange(0, OWN)
    own = query < N
    row, side = _rows(window, query, H, W, shift_y, shift_x, HEIGHT, WIDTH, GRID, SHIFTED)
    q = load_rows(qkv, row, stride, own, D, LANES)

    highest = tl.full((OWN,), LOWEST, tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    acc = tl.zeros((OWN, LANES), tl.float32)
    for first in range(0, N, OTHER):
        key = first + tl.arange(0, OTHER)
        key_row, key_side = _rows(window, key, H, W, shift_y, shift_x, HEIGHT, WIDTH, GRID, SHIFTED)
        k = load_rows(qkv + part, key_row, stride, key < N, D, LANES)
        v = load_rows(qkv + 2 * part, key_row, stride, key < N, D, LANES)
        between = _bias_between(bias, query, key, PADDED, BIASED)
        scores = _scores(q, k, between, side, key, key_side, scale, N, SHIFTED, PRECISION)
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        highest = higher

    store_rows(out + head * D, row, heads * D, own, acc / total[:, None], D, LANES)
    if KEEP_LSE:
        tl.store(lse + row * heads + head, highest + tl.log2(total), mask=own)


@triton.jit
def backward_tile(
    qkv, bias, dout, dqkv, dbias, scale, stride, part, dout_stride, windows, strip, heads, H, W, shift_y, shift_x,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GRID: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr,
    D: tl.constexpr, LANES: tl.constexpr, PADDED: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of windows that are one tile, whatever OWN and OTHER, for a head and a strip of windows."""
    N: tl.constexpr = HEIGHT * WIDTH
    C = heads * D
    index, head, _ = _place(1, heads)  # pyright: ignore[reportGeneralTypeIssues]
    qkv += head * D
    dout += head * D
    dqkv += head * D
    bias += head * PADDED * PADDED

    token = tl.arange(0, PADDED)
    there = token < N
    between = _bias_between(bias, token, token, PADDED, BIASED)
    dbias_sum = tl.zeros((PADDED, PADDED), tl.float32)
    for window in range(index * strip, tl.minimum(index * strip + strip, windows)):
        row, side = _rows(window, token, H, W, shift_y, shift_x, HEIGHT, WIDTH, GRID, SHIFTED)
        q = load_rows(qkv, row, stride, there, D, LANES)
        k = load_rows(qkv + part, row, stride, there, D, LANES)
        v = load_rows(qkv + 2 * part, row, stride, there, D, LANES)
        do = load_rows(dout, row, dout_stride, there, D, LANES)
        scores = _scores(q, k, between, side, token, side, scale, N, SHIFTED, PRECISION)
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        weights = weights / tl.sum(weights, 1)[:, None]
        dv = tl.dot(tl.trans(weights.to(do.dtype)), do, input_precision=PRECISION)
        store_rows(dqkv + 2 * C, row, 3 * C, there, dv, D, LANES)
        dweights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
        if BIASED:
            dbias_sum += dscores
        dscores = dscores.to(q.dtype)
        dq = tl.dot(dscores, k, input_precision=PRECISION) * scale
        store_rows(dqkv, row, 3 * C, there, dq, D, LANES)
        dk = tl.dot(tl.trans(dscores), q, input_precision=PRECISION) * scale
        store_rows(dqkv + C, row, 3 * C, there, dk, D, LANES)
    if BIASED:
        place = (index * heads + head).to(tl.int64) * PADDED * PADDED
        tl.store(dbias + place + token[:, None] * PADDED + token[None, :], dbias_sum)


@triton.jit
def backward_queries(
    qkv, bias, out, dout, lse, delta, dqkv, scale, stride, part, dout_stride, blocks, heads, H, W, shift_y, shift_x,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GRID: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr,
    D: tl.constexpr, LANES: tl.constexpr, PADDED: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = HEIGHT * WIDTH
    C = heads * D
    window, head, block = _place(blocks, heads)  # pyright: ignore[reportGeneralTypeIssues]
    qkv += head * D
    bias += head * PADDED * PADDED

    query = block * OWN + tl.arange(0, OWN)
    own = query < N
    row, side = _rows(window, query, H, W, shift_y, shift_x, HEIGHT, WIDTH, GRID, SHIFTED)
    q = load_rows(qkv, row, stride, own, D, LANES)
    do = load_rows(dout + head * D, row, dout_stride, own, D, LANES)
    o = load_rows(out + head * D, row, C, own, D, LANES)
    own_lse = tl.load(lse + row * heads + head)
    own_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + row * heads + head, own_delta, mask=own)

    dq = tl.zeros((OWN, LANES), tl.float32)
    for first in range(0, N, OTHER):
        key = first + tl.arange(0, OTHER)
        key_row, key_side = _rows(window, key, H, W, shift_y, shift_x, HEIGHT, WIDTH, GRID, SHIFTED)
        k = load_rows(qkv + part, key_row, stride, key < N, D, LANES)
        v = load_rows(qkv + 2 * part, key_row, stride, key < N, D, LANES)
        between = _bias_between(bias, query, key, PADDED, BIASED)
        scores = _scores(q, k, between, side, key, key_side, scale, N, SHIFTED, PRECISION)
        weights = tl.exp2(scores - own_lse[:, None])
        dscores = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - own_delta[:, None])
        dq += tl.dot(dscores.to(k.dtype), k, input_precision=PRECISION)
    store_rows(dqkv + head * D, row, 3 * C, own, dq * scale, D, LANES)


@triton.jit
def backward_keys(
    qkv, bias, dout, lse, delta, dqkv, scale, stride, part, dout_stride, blocks, heads, H, W, shift_y, shift_x,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GRID: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr,
    D: tl.constexpr, LANES: tl.constexpr, PADDED: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = HEIGHT * WIDTH
    C = heads * D
    window, head, block = _place(blocks, heads)  # pyright: ignore[reportGeneralTypeIssues]
    qkv += head * D
    dout += head * D
    bias += head * PADDED * PADDED

    key = block * OWN + tl.arange(0, OWN)
    own = key < N
    row, side = _rows(window, key, H, W, shift_y, shift_x, HEIGHT, WIDTH, GRID, SHIFTED)
    k = load_rows(qkv + part, row, stride, own, D, LANES)
    v = load_rows(qkv + 2 * part, row, stride, own, D, LANES)

    dk = tl.zeros((OWN, LANES), tl.float32)
    dv = tl.zeros((OWN, LANES), tl.float32)
    for first in range(0, N, OTHER):
        query = first + tl.arange(0, OTHER)
        there = query < N
        query_row, query_side = _rows(window, query, H, W, shift_y, shift_x, HEIGHT, WIDTH, GRID, SHIFTED)  # pyright: ignore[reportGeneralTypeIssues]
        q = load_rows(qkv, query_row, stride, there, D, LANES)
        do = load_rows(dout, query_row, dout_stride, there, D, LANES)
        query_lse = tl.load(lse + query_row * heads + head, mask=there, other=float("inf"))  # weights of 0
        query_delta = tl.load(delta + query_row * heads + head, mask=there, other=0.0)
        between = _bias_between(bias, query, key, PADDED, BIASED)
        scores = _scores(q, k, between, query_side, key, side, scale, N, SHIFTED, PRECISION)
        weights = tl.exp2(scores - query_lse[:, None])
        dv += tl.dot(tl.trans(weights.to(do.dtype)), do, input_precision=PRECISION)
        dscores = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - query_delta[:, None])
        dk += tl.dot(tl.trans(dscores.to(q.dtype)), q, input_precision=PRECISION)
    store_rows(dqkv + C + head * D, row, 3 * C, own, dk * scale, D, LANES)
    store_rows(dqkv + 2 * C + head * D, row, 3 * C, own, dv, D, LANES)


@triton.jit
def backward_bias(
    qkv, bias, dout, lse, delta, dbias, scale, stride, part, dout_stride, windows, strip, heads, H, W, shift_y, shift_x,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GRID: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr,
    D: tl.constexpr, LANES: tl.constexpr, PADDED: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The bias between a block of queries and one of keys, for a head and a strip of windows."""
    N: tl.constexpr = HEIGHT * WIDTH
    index, head, block = _place((PADDED // OWN) * (PADDED // OTHER), heads)  # pyright: ignore[reportGeneralTypeIssues]
    qkv += head * D
    dout += head * D
    bias += head * PADDED * PADDED

    query = block // (PADDED // OTHER) * OWN + tl.arange(0, OWN)
    key = block % (PADDED // OTHER) * OTHER + tl.arange(0, OTHER)
    there = query < N
    between = _bias_between(bias, query, key, PADDED, BIASED)
    dbias_sum = tl.zeros((OWN, OTHER), tl.float32)
    for window in range(index * strip, tl.minimum(index * strip + strip, windows)):
        row, side = _rows(window, query, H, W, shift_y, shift_x, HEIGHT, WIDTH, GRID, SHIFTED)
        key_row, key_side = _rows(window, key, H, W, shift_y, shift_x, HEIGHT, WIDTH, GRID, SHIFTED)
        q = load_rows(qkv, row, stride, there, D, LANES)
        do = load_rows(dout, row, dout_stride, there, D, LANES)
        k = load_rows(qkv + part, key_row, stride, key < N, D, LANES)
        v = load_rows(qkv + 2 * part, key_row, stride, key < N, D, LANES)
        query_lse = tl.load(lse + row * heads + head)
        query_delta = tl.load(delta + row * heads + head)
        scores = _scores(q, k, between, side, key, key_side, scale, N, SHIFTED, PRECISION)
        weights = tl.exp2(scores - query_lse[:, None])
        dbias_sum += weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - query_delta[:, None])
    place = (index * heads + head).to(tl.int64) * PADDED * PADDED
    tl.store(dbias + place + query[:, None] * PADDED + key[None, :], dbias_sum)
