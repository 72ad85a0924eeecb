"""Triton kernels of neighbourhood attention, which `ops.kernels.neighborhood_attention` launches.

Along each side of the map, the tokens whose coordinates have the same remainder modulo the dilation form a dilation
group. Tokens attend only to tokens of their own group along both sides. A position is the number of a token in its
group along one side. For a dilation that does not divide the side, groups differ in length by one token.

A tile is a box of tile_h x tile_w positions of one group along H and one group along W. The number of tiles is that of
the longest groups. Where tiles do not divide a group, its last tile begins earlier, so that it holds as many positions
as the others; those that another tile holds as well are not valid there.

The frame of a tile is the box of frame_h x frame_w positions that begins `before` positions before the tile and holds
all keys that the queries of any tile attend to. The pairs of a position of a tile and a position of its frame have the
same offset in all tiles. So a program for queries, which holds the tiles of a strip one after another, loads the bias
once, and the gradient of the bias is a sum over tiles, pair by pair. Pairs of a query and a key outside its
neighbourhood are masked.

The queries that attend to the keys of a tile form a box as well. Its place relative to the tile differs between tiles.

The kernels treat the map as a matrix of B * H * W tokens, one token per row. Arguments of the kernels, with
C = num_heads * D channels:

    qkv, dqkv                    (tokens, 3C), contiguous: queries, keys and values of each token, and their gradients
    bias                         (num_heads, 2 * size_y - 1, 2 * size_x - 1), contiguous, or None: the term added to a
                                 score for each offset from query to key
    out, dout                    (tokens, C), contiguous: the output and its gradient
    lse                          (tokens, num_heads), float32: logarithm to base 2 of the softmax's denominator
    delta                        (tokens, num_heads), float32: sum over the channels of a head of out * dout
    partial_dscores              (strips, num_heads, RESIDENT, FRAME_PARTS * STREAMED), float32: gradients of the
                                 scores, summed over the tiles of a strip
    scale                        factor on the scores; kernels cast it, since TorchInductor passes a float64
    num_heads, H, W              number of heads, and sides of the map in tokens
    tiles_y, tiles_x             number of tiles per group along H and along W
    tile_h, tile_w               number of positions of a tile along H and along W
    size_y, size_x               number of positions of a neighbourhood along H and along W
    dilation_y, dilation_x       dilation along H and along W
    num_tiles                    number of tiles of all images and dilation groups
    strip_tiles                  number of tiles of a strip
    before_y, before_x           number of positions of the frame before the tile along H and along W
    frame_h, frame_w             number of positions of a frame along H and along W
    D, PADDED_D                  number of channels per head, and this number after padding for `tl.arange` and `tl.dot`
    RESIDENT, STREAMED           number of tokens that a program holds (at least tile_h * tile_w), and that it loads per
                                 iteration of its loop
    FRAME_PARTS                  number of parts of STREAMED positions that cover the frame
    WORDS                        `frame_h + frame_w` is less than 32
    PRECISION                    `input_precision` of `tl.dot`

Sizes of the map, the neighbourhood and the dilation are ordinary arguments and not compile-time constants, so a kernel
is compiled once for all of them. The grid has one dimension, with a program for each head and for each strip of tiles,
or for each tile in `backward_keys`.
"""

import triton
import triton.language as tl

from ops.kernels.rows import LOG2E, LOWEST_SCORE, load_rows, store_rows


@triton.jit
def _tile_bounds(number, H, W, tiles_y, tiles_x, tile_h, tile_w, dilation_y, dilation_x):
    """Return where tile `number` of the batch lies.

    Dilation groups vary fastest, then tiles along W, so consecutive programs read nearby tokens from the cache.

    Returns:
        The row of the first token of the tile's dilation group in the matrix of all tokens; the tile's first position
        along H and along W; its first and its last valid position along H, then along W; the number of positions of the
        group along H and along W. The last valid position of an empty tile is less than the first one.
    """
    group_y, group_x = number // dilation_x % dilation_y, number % dilation_x
    number = number // (dilation_y * dilation_x)
    origin = (number // (tiles_y * tiles_x)).to(tl.int64) * H * W + group_y * W + group_x
    valid_y, valid_x = number // tiles_x % tiles_y * tile_h, number % tiles_x * tile_w
    length_y, length_x = (H - 1 - group_y) // dilation_y + 1, (W - 1 - group_x) // dilation_x + 1
    last_y, last_x = tl.minimum(valid_y + tile_h, length_y) - 1, tl.minimum(valid_x + tile_w, length_x) - 1
    first_y = tl.maximum(tl.minimum(valid_y, length_y - tile_h), 0)
    first_x = tl.maximum(tl.minimum(valid_x, length_x - tile_w), 0)
    return origin, first_y, first_x, valid_y, last_y, valid_x, last_x, length_y, length_x


@triton.jit
def _box_tokens(number, first_y, first_x, last_y, last_x, box_w, origin, row_step, column_step):
    """Return the positions of tokens of a box, their rows in the matrix of all tokens, and which lie in the box.

    Args:
        number: numbers of the tokens, counted row by row in the box.
        first_y: first position of the box along H.
        first_x: first position of the box along W.
        last_y: last position of the box along H.
        last_x: last position of the box along W.
        box_w: number of positions of the box along W.
        origin: row of the first token of the dilation group.
        row_step: number of rows of the matrix from one position to the next along H.
        column_step: number of rows of the matrix from one position to the next along W.
    """
    # Exact for numbers below 2**20, and several times faster than a division of integers.
    row = ((number + 0.5) * (1.0 / box_w)).to(tl.int32)
    y, x = first_y + row, first_x + number - row * box_w
    return y, x, origin + y * row_step + x * column_step, (y <= last_y) & (x <= last_x)


@triton.jit
def _neighborhood_start(position, length, size):
    """Return the first position that a query attends to along a side: its neighbourhood is moved inside the map."""
    return tl.minimum(tl.maximum(position - size // 2, 0), length - size)


@triton.jit
def _query_range(first, last, length, size):
    """Return the first and the last query along a side that attend to any key from `first` to `last`."""
    first = tl.where(first < size, 0, first - size + size // 2 + 1)
    return first, tl.where(last >= length - size, length - 1, last + size // 2)


@triton.jit
def _frame_bias(bias, tile_y, tile_x, frame_y, frame_x, size_y, size_x):
    """Return the bias of the pairs of a tile's positions and its frame's positions to base 2; 0 outside the table.

    All positions are relative to the frame's first position.
    """
    y, x = frame_y[None, :] - tile_y[:, None] + size_y - 1, frame_x[None, :] - tile_x[:, None] + size_x - 1
    in_table = (y >= 0) & (y < 2 * size_y - 1) & (x >= 0) & (x < 2 * size_x - 1)
    return tl.load(bias + y * (2 * size_x - 1) + x, mask=in_table, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def _frame_attends(start_y, start_x, frame_y, frame_x, frame_h, size_y, size_x, WORDS: tl.constexpr):
    """Tell which queries attend to which positions of a frame.

    Args:
        start_y: (rows,) position of the frame along H with which the query's neighbourhood begins.
        start_x: (rows,) the same along W.
        frame_y: (columns,) positions of the frame along H, from 0; those from `frame_h` on are padding.
        frame_x: (columns,) positions of the frame along W, from 0.
        frame_h: number of positions of the frame along H.
        size_y: number of positions of a neighbourhood along H.
        size_x: number of positions of a neighbourhood along W.
        WORDS: `frame_h + frame_w` is less than 32. Then a position's bits, one for each side, are compared with the
            bits of all positions that a query attends to, which takes fewer instructions than comparing positions.
    """
    if WORDS:
        attended = (((1 << size_y) - 1) << start_y) | (((1 << size_x) - 1) << (start_x + frame_h))
        position = tl.where(frame_y < frame_h, (1 << frame_y) | (1 << (frame_x + frame_h)), -1)
        attends = (position[None, :] & ~attended[:, None]) == 0
    else:
        y, x = frame_y[None, :] - start_y[:, None], frame_x[None, :] - start_x[:, None]
        attends = (y >= 0) & (y < size_y) & (x >= 0) & (x < size_x)
    return attends


@triton.jit
def forward(
    qkv, bias, out, lse,
    scale, num_heads, H, W, tiles_y, tiles_x, tile_h, tile_w, size_y, size_x, dilation_y, dilation_x,
    num_tiles, strip_tiles, before_y, before_x, frame_h, frame_w,
    D: tl.constexpr, PADDED_D: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr,
    FRAME_PARTS: tl.constexpr, WORDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `out` and `lse` of the queries of a strip of tiles."""
    scale = tl.cast(scale, tl.float32)
    head, C = tl.program_id(0) % num_heads, num_heads * D
    qkv += head * D
    if bias is not None:
        bias += head * (2 * size_y - 1) * (2 * size_x - 1)
    row_step, column_step = dilation_y * W, dilation_x
    number = tl.arange(0, RESIDENT)
    tile_y, tile_x = number // tile_w + before_y, number % tile_w + before_x
    number = tl.arange(0, STREAMED)
    frame_y, frame_x = number // frame_w, number % frame_w
    if bias is not None and FRAME_PARTS == 1:
        frame_bias = _frame_bias(bias, tile_y, tile_x, frame_y, frame_x, size_y, size_x)

    first_tile = tl.program_id(0) // num_heads * strip_tiles
    for tile in range(first_tile, tl.minimum(first_tile + strip_tiles, num_tiles)):
        origin, first_y, first_x, valid_y, last_y, valid_x, last_x, length_y, length_x = _tile_bounds(  # pyright: ignore[reportGeneralTypeIssues]
            tile, H, W, tiles_y, tiles_x, tile_h, tile_w, dilation_y, dilation_x
        )
        query_y, query_x = first_y - before_y + tile_y, first_x - before_x + tile_x
        query_valid = (query_y >= valid_y) & (query_y <= last_y) & (query_x >= valid_x) & (query_x <= last_x)
        query_row = origin + query_y * row_step + query_x * column_step
        q = load_rows(qkv, query_row, 3 * C, query_valid, D, PADDED_D)
        start_y = _neighborhood_start(tl.minimum(query_y, length_y - 1), length_y, size_y) - first_y + before_y
        start_x = _neighborhood_start(tl.minimum(query_x, length_x - 1), length_x, size_x) - first_x + before_x

        running_max = tl.full((RESIDENT,), LOWEST_SCORE, tl.float32)
        denominator = tl.zeros((RESIDENT,), tl.float32)
        acc = tl.zeros((RESIDENT, PADDED_D), tl.float32)
        for part in range(FRAME_PARTS):
            if FRAME_PARTS > 1:
                number = part * STREAMED + tl.arange(0, STREAMED)
                frame_y, frame_x = number // frame_w, number % frame_w
            key_y, key_x = first_y - before_y + frame_y, first_x - before_x + frame_x
            key_valid = (key_y >= 0) & (key_y < length_y) & (key_x >= 0) & (key_x < length_x)
            key_row = origin + key_y * row_step + key_x * column_step
            k = load_rows(qkv + C, key_row, 3 * C, key_valid, D, PADDED_D)
            v = load_rows(qkv + 2 * C, key_row, 3 * C, key_valid, D, PADDED_D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            if bias is not None:
                if FRAME_PARTS > 1:
                    frame_bias = _frame_bias(bias, tile_y, tile_x, frame_y, frame_x, size_y, size_x)
                scores += frame_bias
            attends = _frame_attends(start_y, start_x, frame_y, frame_x, frame_h, size_y, size_x, WORDS)
            scores = tl.where(attends, scores, float("-inf"))
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
    qkv, bias, out, dout, lse, delta, dqkv, partial_dscores,
    scale, num_heads, H, W, tiles_y, tiles_x, tile_h, tile_w, size_y, size_x, dilation_y, dilation_x,
    num_tiles, strip_tiles, before_y, before_x, frame_h, frame_w,
    D: tl.constexpr, PADDED_D: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr,
    FRAME_PARTS: tl.constexpr, WORDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `delta` and the queries' part of `dqkv` of a strip of tiles, and with a bias the strip's sums of dscores.

    The sums stay in registers if the frame is a single part. Otherwise each tile adds to them in memory.
    """
    scale = tl.cast(scale, tl.float32)
    head, C = tl.program_id(0) % num_heads, num_heads * D
    qkv += head * D
    if bias is not None:
        bias += head * (2 * size_y - 1) * (2 * size_x - 1)
        partial_dscores += tl.program_id(0).to(tl.int64) * (RESIDENT * FRAME_PARTS * STREAMED)
    row_step, column_step = dilation_y * W, dilation_x
    number = tl.arange(0, RESIDENT)
    tile_y, tile_x = number // tile_w + before_y, number % tile_w + before_x
    pair = number[:, None] * (FRAME_PARTS * STREAMED) + tl.arange(0, STREAMED)[None, :]
    number = tl.arange(0, STREAMED)
    frame_y, frame_x = number // frame_w, number % frame_w
    if bias is not None and FRAME_PARTS == 1:
        frame_bias = _frame_bias(bias, tile_y, tile_x, frame_y, frame_x, size_y, size_x)
    summed = tl.zeros((RESIDENT, STREAMED), tl.float32)

    first_tile = tl.program_id(0) // num_heads * strip_tiles
    for tile in range(first_tile, tl.minimum(first_tile + strip_tiles, num_tiles)):
        origin, first_y, first_x, valid_y, last_y, valid_x, last_x, length_y, length_x = _tile_bounds(  # pyright: ignore[reportGeneralTypeIssues]
            tile, H, W, tiles_y, tiles_x, tile_h, tile_w, dilation_y, dilation_x
        )
        query_y, query_x = first_y - before_y + tile_y, first_x - before_x + tile_x
        query_valid = (query_y >= valid_y) & (query_y <= last_y) & (query_x >= valid_x) & (query_x <= last_x)
        query_row = origin + query_y * row_step + query_x * column_step
        q = load_rows(qkv, query_row, 3 * C, query_valid, D, PADDED_D)
        do = load_rows(dout + head * D, query_row, C, query_valid, D, PADDED_D)
        o = load_rows(out + head * D, query_row, C, query_valid, D, PADDED_D)
        statistic = query_row * num_heads + head
        # An infinite log-sum-exp makes the weights of queries that are not valid 0.
        query_lse = tl.load(lse + statistic, mask=query_valid, other=float("inf"))
        query_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        tl.store(delta + statistic, query_delta, mask=query_valid)
        start_y = _neighborhood_start(tl.minimum(query_y, length_y - 1), length_y, size_y) - first_y + before_y
        start_x = _neighborhood_start(tl.minimum(query_x, length_x - 1), length_x, size_x) - first_x + before_x

        dq = tl.zeros((RESIDENT, PADDED_D), tl.float32)
        for part in range(FRAME_PARTS):
            if FRAME_PARTS > 1:
                number = part * STREAMED + tl.arange(0, STREAMED)
                frame_y, frame_x = number // frame_w, number % frame_w
            key_y, key_x = first_y - before_y + frame_y, first_x - before_x + frame_x
            key_valid = (key_y >= 0) & (key_y < length_y) & (key_x >= 0) & (key_x < length_x)
            key_row = origin + key_y * row_step + key_x * column_step
            k = load_rows(qkv + C, key_row, 3 * C, key_valid, D, PADDED_D)
            v = load_rows(qkv + 2 * C, key_row, 3 * C, key_valid, D, PADDED_D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            if bias is not None:
                if FRAME_PARTS > 1:
                    frame_bias = _frame_bias(bias, tile_y, tile_x, frame_y, frame_x, size_y, size_x)
                scores += frame_bias
            attends = _frame_attends(start_y, start_x, frame_y, frame_x, frame_h, size_y, size_x, WORDS)
            weights = tl.where(attends, tl.exp2(scores - query_lse[:, None]), 0.0)
            dscores = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - query_delta[:, None])
            dq += tl.dot(dscores.to(k.dtype), k, input_precision=PRECISION)
            if bias is not None:
                if FRAME_PARTS == 1:
                    summed += dscores
                else:
                    sums = partial_dscores + pair + part * STREAMED
                    if tile > first_tile:
                        dscores += tl.load(sums)
                    tl.store(sums, dscores)
        store_rows(dqkv + head * D, query_row, 3 * C, query_valid, dq * scale, D, PADDED_D)
        if bias is not None and FRAME_PARTS > 1:
            # Sums that one thread stored may be loaded by another one for the next tile.
            tl.debug_barrier()
    if bias is not None and FRAME_PARTS == 1:
        tl.store(partial_dscores + pair, summed)


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
    origin, _, _, first_y, last_y, first_x, last_x, length_y, length_x = _tile_bounds(  # pyright: ignore[reportGeneralTypeIssues]
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
