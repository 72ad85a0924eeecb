"""Triton kernels of neighbourhood attention, which `ops.kernels.neighborhood_attention` launches.

Along a side, every `dilation`-th token is of one class, and places are counted in it. A tile is a box of size_y x
size_x places of one class along H and one along W; numbers of tiles are those of the longest class. What a tile's
queries see is a box as well, and so are the queries that see its keys; they are read where they lie in the map and
masked. Rows are the map's tokens: a token's queries, keys and values are C = heads * D apart; heads have D channels,
padded to LANES; statistics of queries are (tokens, heads). All sizes but of tiles in memory are numbers of the launch:
a kernel is compiled once for all maps, neighbourhoods and dilations.
"""

import triton
import triton.language as tl

from ops.kernels.rows import LOG2E, load_rows, store_rows

LOWEST = tl.constexpr(-1e30)  # below all scores, and finite: a query may see none of a block


@triton.jit
def _tile(number, H, W, tiles_y, tiles_x, size_y, size_x, dilation_y, dilation_x):
    """Where the first token of a tile's class lies among all of the batch, the tile's first and last places in the
    class, and the lengths of the class. Tiles in a row are neighbours, so that what they read stays in cache."""
    y, x = number // dilation_x % dilation_y, number % dilation_x
    number = number // (dilation_y * dilation_x)
    corner = (number // (tiles_y * tiles_x)).to(tl.int64) * H * W + y * W + x
    first_y, first_x = number // tiles_x % tiles_y * size_y, number % tiles_x * size_x
    length_y, length_x = (H - 1 - y) // dilation_y + 1, (W - 1 - x) // dilation_x + 1
    last_y, last_x = tl.minimum(first_y + size_y, length_y) - 1, tl.minimum(first_x + size_x, length_x) - 1
    return corner, first_y, first_x, last_y, last_x, length_y, length_x


@triton.jit
def _tokens(index, first_y, first_x, last_y, last_x, width, corner, step_y, step_x):
    """Places of a box's tokens, counted row by row, where they lie, and whether they are in the box and in the map."""
    y, x = first_y + index // width, first_x + index % width
    there = (y >= 0) & (x >= 0) & (y <= last_y) & (x <= last_x)
    return y, x, corner + y * step_y + x * step_x, there


@triton.jit
def _start(place, length, kernel):
    """First key that a query sees along a side."""
    return tl.minimum(tl.maximum(place - kernel // 2, 0), length - kernel)


@triton.jit
def _keys(first, last, length, kernel):
    """First and last key along a side that queries from `first` to `last` see."""
    return _start(first, length, kernel), _start(last, length, kernel) + kernel - 1


@triton.jit
def _queries(first, last, length, kernel):
    """First and last query along a side that see keys from `first` to `last`."""
    first = tl.where(first < kernel, 0, first - kernel + kernel // 2 + 1)
    return first, tl.where(last >= length - kernel, length - 1, last + kernel // 2)


@triton.jit
def _mask(bias, query_y, query_x, key_y, key_x, length_y, length_x, kernel_y, kernel_x):
    """What is added to scores to base 2: the bias, and -inf where a query does not see a key."""
    start_y, start_x = _start(query_y, length_y, kernel_y), _start(query_x, length_x, kernel_x)
    seen = (key_y >= start_y) & (key_y < start_y + kernel_y) & (key_x >= start_x) & (key_x < start_x + kernel_x)
    if bias is None:
        mask = tl.where(seen, 0.0, float("-inf"))
    else:
        width = 2 * kernel_x - 1
        offset = key_y * width + key_x - ((query_y - kernel_y + 1) * width + query_x - kernel_x + 1)
        mask = tl.load(bias + offset, mask=seen, other=float("-inf")).to(tl.float32) * LOG2E
    return mask


@triton.jit
def forward(
    qkv, bias, out, lse, scale, heads, H, W, tiles_y, tiles_x, size_y, size_x, kernel_y, kernel_x, dilation_y,
    dilation_x, D: tl.constexpr, LANES: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, C = tl.program_id(0) % heads, heads * D
    qkv += head * D
    if bias is not None:
        bias += head * (2 * kernel_y - 1) * (2 * kernel_x - 1)
    corner, first_y, first_x, last_y, last_x, length_y, length_x = _tile(  # pyright: ignore[reportGeneralTypeIssues]
        tl.program_id(0) // heads, H, W, tiles_y, tiles_x, size_y, size_x, dilation_y, dilation_x
    )
    step_y, step_x = dilation_y * W, dilation_x
    own = tl.arange(0, OWN)
    y, x, row, there = _tokens(own, first_y, first_x, last_y, last_x, size_x, corner, step_y, step_x)
    y, x = tl.minimum(y, last_y), tl.minimum(x, last_x)
    q = load_rows(qkv, row, 3 * C, there, D, LANES)

    first_y, last_y = _keys(first_y, last_y, length_y, kernel_y)
    first_x, last_x = _keys(first_x, last_x, length_x, kernel_x)
    width = last_x - first_x + 1
    highest = tl.full((OWN,), LOWEST, tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    acc = tl.zeros((OWN, LANES), tl.float32)
    for first in range(0, (last_y - first_y + 1) * width, OTHER):
        other = first + tl.arange(0, OTHER)
        key_y, key_x, key, seen = _tokens(other, first_y, first_x, last_y, last_x, width, corner, step_y, step_x)
        k = load_rows(qkv + C, key, 3 * C, seen, D, LANES)
        v = load_rows(qkv + 2 * C, key, 3 * C, seen, D, LANES)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores += _mask(
            bias, y[:, None], x[:, None], key_y[None, :], key_x[None, :], length_y, length_x, kernel_y, kernel_x
        )
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        highest = higher

    store_rows(out + head * D, row, C, there, acc / total[:, None], D, LANES)
    tl.store(lse + row * heads + head, highest + tl.log2(total), mask=there)


@triton.jit
def backward_queries(
    qkv, bias, out, dout, lse, delta, dqkv, scale, heads, H, W, tiles_y, tiles_x, size_y, size_x, kernel_y, kernel_x,
    dilation_y, dilation_x, D: tl.constexpr, LANES: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head, C = tl.program_id(0) % heads, heads * D
    qkv += head * D
    if bias is not None:
        bias += head * (2 * kernel_y - 1) * (2 * kernel_x - 1)
    corner, first_y, first_x, last_y, last_x, length_y, length_x = _tile(  # pyright: ignore[reportGeneralTypeIssues]
        tl.program_id(0) // heads, H, W, tiles_y, tiles_x, size_y, size_x, dilation_y, dilation_x
    )
    step_y, step_x = dilation_y * W, dilation_x
    own = tl.arange(0, OWN)
    y, x, row, there = _tokens(own, first_y, first_x, last_y, last_x, size_x, corner, step_y, step_x)
    y, x = tl.minimum(y, last_y), tl.minimum(x, last_x)
    q = load_rows(qkv, row, 3 * C, there, D, LANES)
    do = load_rows(dout + head * D, row, C, there, D, LANES)
    o = load_rows(out + head * D, row, C, there, D, LANES)
    own_lse = tl.load(lse + row * heads + head, mask=there, other=float("inf"))
    own_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + row * heads + head, own_delta, mask=there)

    first_y, last_y = _keys(first_y, last_y, length_y, kernel_y)
    first_x, last_x = _keys(first_x, last_x, length_x, kernel_x)
    width = last_x - first_x + 1
    dq = tl.zeros((OWN, LANES), tl.float32)
    for first in range(0, (last_y - first_y + 1) * width, OTHER):
        other = first + tl.arange(0, OTHER)
        key_y, key_x, key, seen = _tokens(other, first_y, first_x, last_y, last_x, width, corner, step_y, step_x)
        k = load_rows(qkv + C, key, 3 * C, seen, D, LANES)
        v = load_rows(qkv + 2 * C, key, 3 * C, seen, D, LANES)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores += _mask(
            bias, y[:, None], x[:, None], key_y[None, :], key_x[None, :], length_y, length_x, kernel_y, kernel_x
        )
        weights = tl.exp2(scores - own_lse[:, None])
        dscores = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - own_delta[:, None])
        dq += tl.dot(dscores.to(k.dtype), k, input_precision=PRECISION)

    store_rows(dqkv + head * D, row, 3 * C, there, dq * scale, D, LANES)


@triton.jit
def backward_keys(
    qkv, bias, dout, lse, delta, dqkv, scale, heads, H, W, tiles_y, tiles_x, size_y, size_x, kernel_y, kernel_x,
    dilation_y, dilation_x, D: tl.constexpr, LANES: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head, C = tl.program_id(0) % heads, heads * D
    qkv += head * D
    dqkv += head * D
    if bias is not None:
        bias += head * (2 * kernel_y - 1) * (2 * kernel_x - 1)
    corner, first_y, first_x, last_y, last_x, length_y, length_x = _tile(  # pyright: ignore[reportGeneralTypeIssues]
        tl.program_id(0) // heads, H, W, tiles_y, tiles_x, size_y, size_x, dilation_y, dilation_x
    )
    step_y, step_x = dilation_y * W, dilation_x
    own = tl.arange(0, OWN)
    y, x, row, there = _tokens(own, first_y, first_x, last_y, last_x, size_x, corner, step_y, step_x)
    k = load_rows(qkv + C, row, 3 * C, there, D, LANES)
    v = load_rows(qkv + 2 * C, row, 3 * C, there, D, LANES)

    first_y, last_y = _queries(first_y, last_y, length_y, kernel_y)
    first_x, last_x = _queries(first_x, last_x, length_x, kernel_x)
    width = last_x - first_x + 1
    dk = tl.zeros((OWN, LANES), tl.float32)
    dv = tl.zeros((OWN, LANES), tl.float32)
    for first in range(0, (last_y - first_y + 1) * width, OTHER):
        other = first + tl.arange(0, OTHER)
        query_y, query_x, query, sees = _tokens(other, first_y, first_x, last_y, last_x, width, corner, step_y, step_x)  # pyright: ignore[reportGeneralTypeIssues]
        query_y = tl.minimum(query_y, last_y)
        q = load_rows(qkv, query, 3 * C, sees, D, LANES)
        do = load_rows(dout + head * D, query, C, sees, D, LANES)
        other_lse = tl.load(lse + query * heads + head, mask=sees, other=float("inf"))
        other_delta = tl.load(delta + query * heads + head, mask=sees, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        scores += _mask(
            bias, query_y[None, :], query_x[None, :], y[:, None], x[:, None], length_y, length_x, kernel_y, kernel_x
        )
        weights = tl.exp2(scores - other_lse[None, :])
        dv += tl.dot(weights.to(do.dtype), do, input_precision=PRECISION)
        dscores = weights * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - other_delta[None, :])
        dk += tl.dot(dscores.to(q.dtype), q, input_precision=PRECISION)

    store_rows(dqkv + C, row, 3 * C, there, dk * scale, D, LANES)
    store_rows(dqkv + 2 * C, row, 3 * C, there, dv, D, LANES)


@triton.jit
def backward_bias(
    qkv, bias, dout, lse, delta, dscores_sum, scale, heads, H, W, tiles_y, tiles_x, size_y, size_x, kernel_y, kernel_x,
    dilation_y, dilation_x, count, strip, blocks, before_y, before_x, frame_y, frame_x,
    D: tl.constexpr, LANES: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Summed gradients of the scores of a head between the queries of `strip` of the `count` tiles and a block of their
    frames, which have frame_y x frame_x places and begin `before` the tiles."""
    index = tl.program_id(0) // (blocks * heads)
    head, block, C = tl.program_id(0) // blocks % heads, tl.program_id(0) % blocks, heads * D
    qkv += head * D
    if bias is not None:
        bias += head * (2 * kernel_y - 1) * (2 * kernel_x - 1)
    step_y, step_x = dilation_y * W, dilation_x
    own, other = tl.arange(0, OWN), block * OTHER + tl.arange(0, OTHER)

    acc = tl.zeros((OWN, OTHER), tl.float32)
    for number in range(index * strip, tl.minimum(index * strip + strip, count)):
        corner, first_y, first_x, last_y, last_x, length_y, length_x = _tile(  # pyright: ignore[reportGeneralTypeIssues]
            number, H, W, tiles_y, tiles_x, size_y, size_x, dilation_y, dilation_x
        )
        y, x, row, there = _tokens(own, first_y, first_x, last_y, last_x, size_x, corner, step_y, step_x)
        y, x = tl.minimum(y, last_y), tl.minimum(x, last_x)
        q = load_rows(qkv, row, 3 * C, there, D, LANES)
        do = load_rows(dout + head * D, row, C, there, D, LANES)
        own_lse = tl.load(lse + row * heads + head, mask=there, other=float("inf"))
        own_delta = tl.load(delta + row * heads + head, mask=there, other=0.0)
        first_y, first_x = first_y - before_y, first_x - before_x
        last_y, last_x = tl.minimum(first_y + frame_y, length_y) - 1, tl.minimum(first_x + frame_x, length_x) - 1
        key_y, key_x, key, seen = _tokens(other, first_y, first_x, last_y, last_x, frame_x, corner, step_y, step_x)
        k = load_rows(qkv + C, key, 3 * C, seen, D, LANES)
        v = load_rows(qkv + 2 * C, key, 3 * C, seen, D, LANES)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores += _mask(
            bias, y[:, None], x[:, None], key_y[None, :], key_x[None, :], length_y, length_x, kernel_y, kernel_x
        )
        weights = tl.exp2(scores - own_lse[:, None])
        acc += weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - own_delta[:, None])
    place = (index * heads + head).to(tl.int64) * OWN
    tl.store(dscores_sum + (place + own)[:, None] * (blocks * OTHER) + other[None, :], acc)
