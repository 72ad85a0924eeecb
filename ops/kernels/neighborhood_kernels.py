"""Triton kernels of neighbourhood attention, which `ops.kernels.neighborhood_attention` launches.

Along each side of the map, the tokens whose coordinates have the same remainder modulo the dilation form a dilation
group. Tokens attend only to tokens of their own group along both sides. A position is the number of a token in its
group along one side. For a dilation that does not divide the side, groups differ in length by one token.

A tile is a box of tile_h x tile_w positions of one group along H and one group along W. The number of tiles is that of
the longest groups, so tiles of shorter groups may be partly or wholly empty. The keys that the queries of a tile attend
to form a box as well, and so do the queries that attend to the keys of a tile. Kernels read these boxes directly from
the map and mask the pairs of a query and a key outside its neighbourhood.

The kernels treat the map as a matrix of B * H * W tokens, one token per row. Arguments of the kernels, with
C = num_heads * D channels:

    qkv, dqkv                    (tokens, 3C), contiguous: queries, keys and values of each token, and their gradients
    bias                         (num_heads, 2 * size_y - 1, 2 * size_x - 1), contiguous, or None: the term added to a
                                 score for each offset from query to key
    out, dout                    (tokens, C), contiguous: the output and its gradient
    lse                          (tokens, num_heads), float32: logarithm to base 2 of the softmax's denominator
    delta                        (tokens, num_heads), float32: sum over the channels of a head of out * dout
    partial_dscores              (strips of tiles, num_heads, RESIDENT, frame_parts * STREAMED), float32: sums of the
                                 programs of `backward_bias`
    scale                        factor on the scores; kernels cast it, since TorchInductor passes a float64
    num_heads, H, W              number of heads, and sides of the map in tokens
    tiles_y, tiles_x             number of tiles per group along H and along W
    tile_h, tile_w               number of positions of a tile along H and along W
    size_y, size_x               number of positions of a neighbourhood along H and along W
    dilation_y, dilation_x       dilation along H and along W
    D, PADDED_D                  number of channels per head, and this number after padding for `tl.arange` and `tl.dot`
    RESIDENT, STREAMED           number of tokens that a program holds (at least tile_h * tile_w), and that it loads per
                                 iteration of its loop
    PRECISION                    `input_precision` of `tl.dot`

Sizes of the map, the neighbourhood and the dilation are ordinary arguments and not compile-time constants, so a kernel
is compiled once for all of them. The grid has one dimension. Except in `backward_bias`, it has B * tiles_y * tiles_x *
dilation_y * dilation_x * num_heads programs; a program holds one tile for one head.
"""

import triton
import triton.language as tl

from ops.kernels.rows import LOG2E, load_rows, store_rows

# Initial maximum of the scores: below any score, but finite. A query may attend to no key of a streamed tile. With a
# maximum of -inf, the difference between its masked scores and the maximum would be NaN.
LOWEST_SCORE = tl.constexpr(-1e30)


@triton.jit
def _tile_bounds(number, H, W, tiles_y, tiles_x, tile_h, tile_w, dilation_y, dilation_x):
    """Return where tile `number` of the batch lies.

    Dilation groups vary fastest, then tiles along W, so consecutive programs read nearby tokens from the cache.

    Returns:
        The row of the first token of the tile's dilation group in the matrix of all tokens; the tile's first position
        along H and along W, and the last ones that exist in the group; the number of positions of the group along H
        and along W. An empty tile's last position is less than its first.
    """
    group_y, group_x = number // dilation_x % dilation_y, number % dilation_x
    number = number // (dilation_y * dilation_x)
    origin = (number // (tiles_y * tiles_x)).to(tl.int64) * H * W + group_y * W + group_x
    first_y, first_x = number // tiles_x % tiles_y * tile_h, number % tiles_x * tile_w
    length_y, length_x = (H - 1 - group_y) // dilation_y + 1, (W - 1 - group_x) // dilation_x + 1
    last_y, last_x = tl.minimum(first_y + tile_h, length_y) - 1, tl.minimum(first_x + tile_w, length_x) - 1
    return origin, first_y, first_x, last_y, last_x, length_y, length_x


@triton.jit
def _box_tokens(number, first_y, first_x, last_y, last_x, box_w, origin, row_step, column_step):
    """Return the positions of tokens of a box, their rows in the matrix of all tokens, and which of them are valid.

    A position is valid if it lies in the box and is not negative.

    Args:
        number: numbers of the tokens, counted row by row in the box.
        first_y: first position of the box along H; may be negative.
        first_x: first position of the box along W; may be negative.
        last_y: last position of the box along H.
        last_x: last position of the box along W.
        box_w: number of positions of the box along W.
        origin: row of the first token of the dilation group.
        row_step: number of rows of the matrix from one position to the next along H.
        column_step: number of rows of the matrix from one position to the next along W.
    """
    y, x = first_y + number // box_w, first_x + number % box_w
    valid = (y >= 0) & (x >= 0) & (y <= last_y) & (x <= last_x)
    return y, x, origin + y * row_step + x * column_step, valid


@triton.jit
def _neighborhood_start(position, length, size):
    """Return the first position that a query attends to along a side: its neighbourhood is moved inside the map."""
    return tl.minimum(tl.maximum(position - size // 2, 0), length - size)


@triton.jit
def _key_range(first, last, length, size):
    """Return the first and the last key along a side that any query from `first` to `last` attends to."""
    return _neighborhood_start(first, length, size), _neighborhood_start(last, length, size) + size - 1


@triton.jit
def _query_range(first, last, length, size):
    """Return the first and the last query along a side that attend to any key from `first` to `last`."""
    first = tl.where(first < size, 0, first - size + size // 2 + 1)
    return first, tl.where(last >= length - size, length - 1, last + size // 2)


@triton.jit
def _masked_bias(bias, query_y, query_x, key_y, key_x, length_y, length_x, size_y, size_x):
    """Return the term that is added to scores to base 2: the bias, and -inf for keys outside a query's neighbourhood.

    Positions of queries and keys broadcast to the shape of the scores. Positions of queries must exist in the group,
    so that all offsets of attended keys lie inside the table of the bias.
    """
    start_y = _neighborhood_start(query_y, length_y, size_y)
    start_x = _neighborhood_start(query_x, length_x, size_x)
    attends = (key_y >= start_y) & (key_y < start_y + size_y) & (key_x >= start_x) & (key_x < start_x + size_x)
    if bias is None:
        masked_bias = tl.where(attends, 0.0, float("-inf"))
    else:
        table_w = 2 * size_x - 1
        offset = key_y * table_w + key_x - ((query_y - size_y + 1) * table_w + query_x - size_x + 1)
        masked_bias = tl.load(bias + offset, mask=attends, other=float("-inf")).to(tl.float32) * LOG2E
    return masked_bias


@triton.jit
def forward(
    qkv, bias, out, lse,
    scale, num_heads, H, W, tiles_y, tiles_x, tile_h, tile_w, size_y, size_x, dilation_y, dilation_x,
    D: tl.constexpr, PADDED_D: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `out` and `lse` of a tile of queries; loop over the box of keys that they attend to."""
    scale = tl.cast(scale, tl.float32)
    head, C = tl.program_id(0) % num_heads, num_heads * D
    qkv += head * D
    if bias is not None:
        bias += head * (2 * size_y - 1) * (2 * size_x - 1)
    origin, first_y, first_x, last_y, last_x, length_y, length_x = _tile_bounds(  # pyright: ignore[reportGeneralTypeIssues]
        tl.program_id(0) // num_heads, H, W, tiles_y, tiles_x, tile_h, tile_w, dilation_y, dilation_x
    )
    row_step, column_step = dilation_y * W, dilation_x
    query_y, query_x, query_row, query_valid = _box_tokens(  # pyright: ignore[reportGeneralTypeIssues]
        tl.arange(0, RESIDENT), first_y, first_x, last_y, last_x, tile_w, origin, row_step, column_step
    )
    # Padding queries take positions that exist, since `_masked_bias` requires it.
    query_y, query_x = tl.minimum(query_y, last_y), tl.minimum(query_x, last_x)
    q = load_rows(qkv, query_row, 3 * C, query_valid, D, PADDED_D)

    first_y, last_y = _key_range(first_y, last_y, length_y, size_y)
    first_x, last_x = _key_range(first_x, last_x, length_x, size_x)
    box_w = last_x - first_x + 1
    running_max = tl.full((RESIDENT,), LOWEST_SCORE, tl.float32)
    denominator = tl.zeros((RESIDENT,), tl.float32)
    acc = tl.zeros((RESIDENT, PADDED_D), tl.float32)
    for first in range(0, (last_y - first_y + 1) * box_w, STREAMED):
        key_y, key_x, key_row, key_valid = _box_tokens(  # pyright: ignore[reportGeneralTypeIssues]
            first + tl.arange(0, STREAMED), first_y, first_x, last_y, last_x, box_w, origin, row_step, column_step
        )
        k = load_rows(qkv + C, key_row, 3 * C, key_valid, D, PADDED_D)
        v = load_rows(qkv + 2 * C, key_row, 3 * C, key_valid, D, PADDED_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores += _masked_bias(
            bias, query_y[:, None], query_x[:, None], key_y[None, :], key_x[None, :], length_y, length_x, size_y, size_x
        )
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(running_max - new_max)
        denominator = denominator * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        running_max = new_max

    store_rows(out + head * D, query_row, C, query_valid, acc / denominator[:, None], D, PADDED_D)
    tl.store(lse + query_row * num_heads + head, running_max + tl.log2(denominator), mask=query_valid)


@triton.jit
def backward_queries(
    qkv, bias, out, dout, lse, delta, dqkv,
    scale, num_heads, H, W, tiles_y, tiles_x, tile_h, tile_w, size_y, size_x, dilation_y, dilation_x,
    D: tl.constexpr, PADDED_D: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `delta` and the queries' part of `dqkv` of a tile of queries; loop over the box of keys as `forward`."""
    scale = tl.cast(scale, tl.float32)
    head, C = tl.program_id(0) % num_heads, num_heads * D
    qkv += head * D
    if bias is not None:
        bias += head * (2 * size_y - 1) * (2 * size_x - 1)
    origin, first_y, first_x, last_y, last_x, length_y, length_x = _tile_bounds(  # pyright: ignore[reportGeneralTypeIssues]
        tl.program_id(0) // num_heads, H, W, tiles_y, tiles_x, tile_h, tile_w, dilation_y, dilation_x
    )
    row_step, column_step = dilation_y * W, dilation_x
    query_y, query_x, query_row, query_valid = _box_tokens(  # pyright: ignore[reportGeneralTypeIssues]
        tl.arange(0, RESIDENT), first_y, first_x, last_y, last_x, tile_w, origin, row_step, column_step
    )
    # Padding queries take positions that exist, since `_masked_bias` requires it.
    query_y, query_x = tl.minimum(query_y, last_y), tl.minimum(query_x, last_x)
    q = load_rows(qkv, query_row, 3 * C, query_valid, D, PADDED_D)
    do = load_rows(dout + head * D, query_row, C, query_valid, D, PADDED_D)
    o = load_rows(out + head * D, query_row, C, query_valid, D, PADDED_D)
    # An infinite log-sum-exp makes the weights of padding queries 0.
    query_lse = tl.load(lse + query_row * num_heads + head, mask=query_valid, other=float("inf"))
    query_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + query_row * num_heads + head, query_delta, mask=query_valid)

    first_y, last_y = _key_range(first_y, last_y, length_y, size_y)
    first_x, last_x = _key_range(first_x, last_x, length_x, size_x)
    box_w = last_x - first_x + 1
    dq = tl.zeros((RESIDENT, PADDED_D), tl.float32)
    for first in range(0, (last_y - first_y + 1) * box_w, STREAMED):
        key_y, key_x, key_row, key_valid = _box_tokens(  # pyright: ignore[reportGeneralTypeIssues]
            first + tl.arange(0, STREAMED), first_y, first_x, last_y, last_x, box_w, origin, row_step, column_step
        )
        k = load_rows(qkv + C, key_row, 3 * C, key_valid, D, PADDED_D)
        v = load_rows(qkv + 2 * C, key_row, 3 * C, key_valid, D, PADDED_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores += _masked_bias(
            bias, query_y[:, None], query_x[:, None], key_y[None, :], key_x[None, :], length_y, length_x, size_y, size_x
        )
        weights = tl.exp2(scores - query_lse[:, None])
        dscores = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - query_delta[:, None])
        dq += tl.dot(dscores.to(k.dtype), k, input_precision=PRECISION)

    store_rows(dqkv + head * D, query_row, 3 * C, query_valid, dq * scale, D, PADDED_D)


@triton.jit
def backward_keys(
    qkv, bias, dout, lse, delta, dqkv,
    scale, num_heads, H, W, tiles_y, tiles_x, tile_h, tile_w, size_y, size_x, dilation_y, dilation_x,
    D: tl.constexpr, PADDED_D: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the keys' and the values' parts of `dqkv` of a tile of keys; loop over the queries that attend to them.

    The kernel reads `delta`, which `backward_queries` has written.
    """
    scale = tl.cast(scale, tl.float32)
    head, C = tl.program_id(0) % num_heads, num_heads * D
    qkv += head * D
    dqkv += head * D
    if bias is not None:
        bias += head * (2 * size_y - 1) * (2 * size_x - 1)
    origin, first_y, first_x, last_y, last_x, length_y, length_x = _tile_bounds(  # pyright: ignore[reportGeneralTypeIssues]
        tl.program_id(0) // num_heads, H, W, tiles_y, tiles_x, tile_h, tile_w, dilation_y, dilation_x
    )
    row_step, column_step = dilation_y * W, dilation_x
    key_y, key_x, key_row, key_valid = _box_tokens(  # pyright: ignore[reportGeneralTypeIssues]
        tl.arange(0, RESIDENT), first_y, first_x, last_y, last_x, tile_w, origin, row_step, column_step
    )
    k = load_rows(qkv + C, key_row, 3 * C, key_valid, D, PADDED_D)
    v = load_rows(qkv + 2 * C, key_row, 3 * C, key_valid, D, PADDED_D)

    first_y, last_y = _query_range(first_y, last_y, length_y, size_y)
    first_x, last_x = _query_range(first_x, last_x, length_x, size_x)
    box_w = last_x - first_x + 1
    dk = tl.zeros((RESIDENT, PADDED_D), tl.float32)
    dv = tl.zeros((RESIDENT, PADDED_D), tl.float32)
    for first in range(0, (last_y - first_y + 1) * box_w, STREAMED):
        query_y, query_x, query_row, query_valid = _box_tokens(  # pyright: ignore[reportGeneralTypeIssues]
            first + tl.arange(0, STREAMED), first_y, first_x, last_y, last_x, box_w, origin, row_step, column_step
        )
        # Numbers beyond the box continue below its last row. They take positions that exist, since `_masked_bias`
        # requires it.
        query_y = tl.minimum(query_y, last_y)
        q = load_rows(qkv, query_row, 3 * C, query_valid, D, PADDED_D)
        do = load_rows(dout + head * D, query_row, C, query_valid, D, PADDED_D)
        # An infinite log-sum-exp makes the weights of padding queries 0.
        query_lse = tl.load(lse + query_row * num_heads + head, mask=query_valid, other=float("inf"))
        query_delta = tl.load(delta + query_row * num_heads + head, mask=query_valid, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        scores += _masked_bias(
            bias, query_y[None, :], query_x[None, :], key_y[:, None], key_x[:, None], length_y, length_x, size_y, size_x
        )
        weights = tl.exp2(scores - query_lse[None, :])
        dv += tl.dot(weights.to(do.dtype), do, input_precision=PRECISION)
        dscores = weights * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - query_delta[None, :])
        dk += tl.dot(dscores.to(q.dtype), q, input_precision=PRECISION)

    store_rows(dqkv + C, key_row, 3 * C, key_valid, dk * scale, D, PADDED_D)
    store_rows(dqkv + 2 * C, key_row, 3 * C, key_valid, dv, D, PADDED_D)


@triton.jit
def backward_bias(
    qkv, bias, dout, lse, delta, partial_dscores,
    scale, num_heads, H, W, tiles_y, tiles_x, tile_h, tile_w, size_y, size_x, dilation_y, dilation_x,
    num_tiles, tiles_per_program, frame_parts, margin_y, margin_x, frame_h, frame_w,
    D: tl.constexpr, PADDED_D: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of the scores between the queries of a tile and a part of its frame, over a strip of tiles.

    The frame of a tile is the box of frame_h x frame_w positions that begins `margin` positions before the tile and
    contains all keys that the tile's queries attend to. The frame is divided into `frame_parts` parts of STREAMED
    positions. Position p of a tile and position f of its frame have the same offset in all tiles, so gradients of the
    scores can be summed over tiles for each pair (p, f).

    The grid has ceil(num_tiles / tiles_per_program) * num_heads * frame_parts programs, for the `num_tiles` tiles of
    all images and dilation groups. The kernel reads `delta`, which `backward_queries` has written.
    """
    scale = tl.cast(scale, tl.float32)
    strip = tl.program_id(0) // (frame_parts * num_heads)
    head, part, C = tl.program_id(0) // frame_parts % num_heads, tl.program_id(0) % frame_parts, num_heads * D
    qkv += head * D
    if bias is not None:
        bias += head * (2 * size_y - 1) * (2 * size_x - 1)
    row_step, column_step = dilation_y * W, dilation_x
    tile_position, frame_position = tl.arange(0, RESIDENT), part * STREAMED + tl.arange(0, STREAMED)

    acc = tl.zeros((RESIDENT, STREAMED), tl.float32)
    first_tile = strip * tiles_per_program
    for number in range(first_tile, tl.minimum(first_tile + tiles_per_program, num_tiles)):
        origin, first_y, first_x, last_y, last_x, length_y, length_x = _tile_bounds(  # pyright: ignore[reportGeneralTypeIssues]
            number, H, W, tiles_y, tiles_x, tile_h, tile_w, dilation_y, dilation_x
        )
        query_y, query_x, query_row, query_valid = _box_tokens(  # pyright: ignore[reportGeneralTypeIssues]
            tile_position, first_y, first_x, last_y, last_x, tile_w, origin, row_step, column_step
        )
        # Padding queries take positions that exist, since `_masked_bias` requires it.
        query_y, query_x = tl.minimum(query_y, last_y), tl.minimum(query_x, last_x)
        q = load_rows(qkv, query_row, 3 * C, query_valid, D, PADDED_D)
        do = load_rows(dout + head * D, query_row, C, query_valid, D, PADDED_D)
        # An infinite log-sum-exp makes the weights of padding queries 0.
        query_lse = tl.load(lse + query_row * num_heads + head, mask=query_valid, other=float("inf"))
        query_delta = tl.load(delta + query_row * num_heads + head, mask=query_valid, other=0.0)
        first_y, first_x = first_y - margin_y, first_x - margin_x
        last_y, last_x = tl.minimum(first_y + frame_h, length_y) - 1, tl.minimum(first_x + frame_w, length_x) - 1
        key_y, key_x, key_row, key_valid = _box_tokens(  # pyright: ignore[reportGeneralTypeIssues]
            frame_position, first_y, first_x, last_y, last_x, frame_w, origin, row_step, column_step
        )
        k = load_rows(qkv + C, key_row, 3 * C, key_valid, D, PADDED_D)
        v = load_rows(qkv + 2 * C, key_row, 3 * C, key_valid, D, PADDED_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores += _masked_bias(
            bias, query_y[:, None], query_x[:, None], key_y[None, :], key_x[None, :], length_y, length_x, size_y, size_x
        )
        weights = tl.exp2(scores - query_lse[:, None])
        acc += weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - query_delta[:, None])
    first_row = (strip * num_heads + head).to(tl.int64) * RESIDENT
    rows = (first_row + tile_position)[:, None]
    tl.store(partial_dscores + rows * (frame_parts * STREAMED) + frame_position[None, :], acc)
