"""Triton kernels of window attention, which `ops.kernels.window_attention` launches.

The kernels treat the map as a matrix of B * H * W tokens, one token per row. Arguments of the kernels, for windows of
N = WINDOW_H * WINDOW_W tokens and C = num_heads * D channels:

    qkv                          (tokens, 3, C): queries, keys and values; the strides of the first two dimensions are
                                 `token_stride` and `part_stride`, the stride of the channels is 1
    bias                         (num_heads, BIAS_SIDE, BIAS_SIDE), contiguous; not read unless BIASED
    out                          (tokens, C), contiguous
    dout                         (tokens, C) with `dout_stride` values from one token to the next
    lse                          (tokens, num_heads), float32: logarithm to base 2 of the softmax's denominator
    delta                        (tokens, num_heads), float32: sum over the channels of a head of out * dout
    dqkv                         (tokens, 3, C), contiguous
    partial_dbias                (strips of windows, num_heads, BIAS_SIDE, BIAS_SIDE), float32: gradient of the bias,
                                 summed over the windows of each strip
    scale                        factor on the scores; kernels cast it, since TorchInductor passes a float64
    tiles_per_window             number of resident tiles that cover a window
    num_windows                  number of windows in the batch
    windows_per_program          number of consecutive windows in a strip, over which a program sums the gradient of the
                                 bias
    num_heads, H, W              number of heads, and sides of the map in tokens
    shift_y, shift_x             number of tokens by which the map is rolled up and left before it is cut into windows
    WINDOW_H, WINDOW_W           number of tokens of a window along H and along W
    GRID                         whether a window's tokens are spread evenly over the map, rather than side by side
    SHIFTED                      whether a shift is not 0
    BIASED                       whether there is a bias
    D, PADDED_D                  number of channels per head, and this number after padding for `tl.arange` and `tl.dot`
    BIAS_SIDE                    N after padding
    RESIDENT, STREAMED           number of tokens that a program holds, and that it loads per iteration of its loop
    PRECISION                    `input_precision` of `tl.dot`
    KEEP_LSE                     whether to store `lse`
"""

import triton
import triton.language as tl

from ops.kernels.rows import LOG2E, load_rows, store_rows

# Initial maximum of the scores: below any score, but finite. The shift may mask all scores of a query in one tile. With
# a maximum of -inf, the difference between these scores and the maximum would be NaN.
LOWEST_SCORE = tl.constexpr(-1e30)


@triton.jit
def _program_indices(tiles_per_window, num_heads):
    """Return window (or strip of windows), head and tile of this program.

    Heads and tiles vary fastest, so consecutive programs read the same cache lines of the tokens.
    """
    program = tl.program_id(0)
    window = program // (tiles_per_window * num_heads)
    return window, program // tiles_per_window % num_heads, program % tiles_per_window


@triton.jit
def _token_rows(
    window, token, H, W, shift_y, shift_x,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, GRID: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Return the rows of a window's tokens, and the region of the rolled map in which each token lies.

    The roll brings together tokens from opposite sides of the map. Such tokens lie in different regions, and tokens of
    different regions do not attend to each other.

    Args:
        window: number of the window in the batch.
        token: numbers of tokens inside the window, row by row. Numbers from N on, which only pad the tile, stand for
            the last token, so that each query of a tile attends to at least one key and has a finite softmax.
        H: tokens of the map along H.
        W: tokens of the map along W.
        shift_y: tokens by which the map is rolled up.
        shift_x: tokens by which the map is rolled left.
        WINDOW_H: tokens of a window along H.
        WINDOW_W: tokens of a window along W.
        GRID: whether a window's tokens are spread evenly over the map.
        SHIFTED: whether a shift is not 0.

    Returns:
        The row of each token in the matrix of all tokens, and its region: 0 to 3.
    """
    token = tl.minimum(token, WINDOW_H * WINDOW_W - 1)
    windows_y, windows_x = H // WINDOW_H, W // WINDOW_W
    image = window // (windows_y * windows_x)
    window_y, window_x = window // windows_x % windows_y, window % windows_x
    if GRID:
        y, x = token // WINDOW_W * windows_y + window_y, token % WINDOW_W * windows_x + window_x
    else:
        y, x = window_y * WINDOW_H + token // WINDOW_W, window_x * WINDOW_W + token % WINDOW_W
    region = tl.zeros_like(token)
    if SHIFTED:
        region = (y >= H - shift_y).to(tl.int32) * 2 + (x >= W - shift_x).to(tl.int32)
        y, x = (y + shift_y) % H, (x + shift_x) % W
    return (image * (H * W) + y * W + x).to(tl.int64), region


@triton.jit
def _load_bias(bias, query, key, BIAS_SIDE: tl.constexpr, BIASED: tl.constexpr):
    """Return the bias for scores to base 2 between tokens `query` and `key` of a window: (queries, keys), or 0.

    The bias is padded to whole tiles, so this read needs no mask.
    """
    return tl.load(bias + query[:, None] * BIAS_SIDE + key[None, :]).to(tl.float32) * LOG2E if BIASED else 0.0


@triton.jit
def _masked_scores(
    q, k, bias_tile, query_region, key, key_region, scale,
    N: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return scores to base 2, (queries, keys): -inf for padding keys and between tokens of different regions."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias_tile
    attends = (key < N)[None, :]
    if SHIFTED:
        attends = attends & (query_region[:, None] == key_region[None, :])
    return tl.where(attends, scores, float("-inf"))


@triton.jit
def forward(
    qkv, bias, out, lse, scale, token_stride, part_stride, tiles_per_window, num_heads, H, W, shift_y, shift_x,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, GRID: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BIAS_SIDE: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr,
    PRECISION: tl.constexpr, KEEP_LSE: tl.constexpr,
):  # fmt: skip
    """Compute `out`, and `lse` if KEEP_LSE, for a tile of queries of one window and one head.

    The grid has num_windows * num_heads * tiles_per_window programs. A program loops over all keys of its window.
    """
    scale = tl.cast(scale, tl.float32)
    N: tl.constexpr = WINDOW_H * WINDOW_W
    window, head, tile = _program_indices(tiles_per_window, num_heads)  # pyright: ignore[reportGeneralTypeIssues]
    qkv += head * D
    bias += head * BIAS_SIDE * BIAS_SIDE

    query = tile * RESIDENT + tl.arange(0, RESIDENT)
    query_valid = query < N
    query_row, query_region = _token_rows(window, query, H, W, shift_y, shift_x, WINDOW_H, WINDOW_W, GRID, SHIFTED)  # pyright: ignore[reportGeneralTypeIssues]
    q = load_rows(qkv, query_row, token_stride, query_valid, D, PADDED_D)

    running_max = tl.full((RESIDENT,), LOWEST_SCORE, tl.float32)
    denominator = tl.zeros((RESIDENT,), tl.float32)
    acc = tl.zeros((RESIDENT, PADDED_D), tl.float32)
    for first in range(0, N, STREAMED):
        key = first + tl.arange(0, STREAMED)
        key_row, key_region = _token_rows(window, key, H, W, shift_y, shift_x, WINDOW_H, WINDOW_W, GRID, SHIFTED)
        k = load_rows(qkv + part_stride, key_row, token_stride, key < N, D, PADDED_D)
        v = load_rows(qkv + 2 * part_stride, key_row, token_stride, key < N, D, PADDED_D)
        bias_tile = _load_bias(bias, query, key, BIAS_SIDE, BIASED)
        scores = _masked_scores(q, k, bias_tile, query_region, key, key_region, scale, N, SHIFTED, PRECISION)
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(running_max - new_max)
        denominator = denominator * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        running_max = new_max

    store_rows(out + head * D, query_row, num_heads * D, query_valid, acc / denominator[:, None], D, PADDED_D)
    if KEEP_LSE:
        tl.store(lse + query_row * num_heads + head, running_max + tl.log2(denominator), mask=query_valid)


@triton.jit
def backward_tile(
    qkv, bias, dout, dqkv, partial_dbias,
    scale, token_stride, part_stride, dout_stride, num_windows, windows_per_program, num_heads, H, W, shift_y, shift_x,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, GRID: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BIAS_SIDE: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of windows that fit one tile of BIAS_SIDE tokens, for one head.

    The grid has ceil(num_windows / windows_per_program) * num_heads programs. A program loops over a strip of
    windows_per_program windows, computes the weights again from `qkv`, and keeps the sum of the bias's gradients in
    registers. RESIDENT and STREAMED have no effect.
    """
    scale = tl.cast(scale, tl.float32)
    N: tl.constexpr = WINDOW_H * WINDOW_W
    C = num_heads * D
    strip, head, _ = _program_indices(1, num_heads)  # pyright: ignore[reportGeneralTypeIssues]
    qkv += head * D
    dout += head * D
    dqkv += head * D
    bias += head * BIAS_SIDE * BIAS_SIDE

    token = tl.arange(0, BIAS_SIDE)
    valid = token < N
    bias_tile = _load_bias(bias, token, token, BIAS_SIDE, BIASED)
    dbias_sum = tl.zeros((BIAS_SIDE, BIAS_SIDE), tl.float32)
    first_window = strip * windows_per_program
    for window in range(first_window, tl.minimum(first_window + windows_per_program, num_windows)):
        row, region = _token_rows(window, token, H, W, shift_y, shift_x, WINDOW_H, WINDOW_W, GRID, SHIFTED)
        q = load_rows(qkv, row, token_stride, valid, D, PADDED_D)
        k = load_rows(qkv + part_stride, row, token_stride, valid, D, PADDED_D)
        v = load_rows(qkv + 2 * part_stride, row, token_stride, valid, D, PADDED_D)
        do = load_rows(dout, row, dout_stride, valid, D, PADDED_D)
        scores = _masked_scores(q, k, bias_tile, region, token, region, scale, N, SHIFTED, PRECISION)
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        weights = weights / tl.sum(weights, 1)[:, None]
        dv = tl.dot(tl.trans(weights.to(do.dtype)), do, input_precision=PRECISION)
        store_rows(dqkv + 2 * C, row, 3 * C, valid, dv, D, PADDED_D)
        dweights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
        if BIASED:
            dbias_sum += dscores
        dscores = dscores.to(q.dtype)
        dq = tl.dot(dscores, k, input_precision=PRECISION) * scale
        store_rows(dqkv, row, 3 * C, valid, dq, D, PADDED_D)
        dk = tl.dot(tl.trans(dscores), q, input_precision=PRECISION) * scale
        store_rows(dqkv + C, row, 3 * C, valid, dk, D, PADDED_D)
    if BIASED:
        offset = (strip * num_heads + head).to(tl.int64) * BIAS_SIDE * BIAS_SIDE
        tl.store(partial_dbias + offset + token[:, None] * BIAS_SIDE + token[None, :], dbias_sum)


@triton.jit
def backward_queries(
    qkv, bias, out, dout, lse, delta, dqkv,
    scale, token_stride, part_stride, dout_stride, tiles_per_window, num_heads, H, W, shift_y, shift_x,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, GRID: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BIAS_SIDE: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `delta` and the queries' part of `dqkv` for a tile of queries of one window and one head.

    The grid has num_windows * num_heads * tiles_per_window programs. A program loops over all keys of its window.
    """
    scale = tl.cast(scale, tl.float32)
    N: tl.constexpr = WINDOW_H * WINDOW_W
    C = num_heads * D
    window, head, tile = _program_indices(tiles_per_window, num_heads)  # pyright: ignore[reportGeneralTypeIssues]
    qkv += head * D
    bias += head * BIAS_SIDE * BIAS_SIDE

    query = tile * RESIDENT + tl.arange(0, RESIDENT)
    query_valid = query < N
    query_row, query_region = _token_rows(window, query, H, W, shift_y, shift_x, WINDOW_H, WINDOW_W, GRID, SHIFTED)  # pyright: ignore[reportGeneralTypeIssues]
    q = load_rows(qkv, query_row, token_stride, query_valid, D, PADDED_D)
    do = load_rows(dout + head * D, query_row, dout_stride, query_valid, D, PADDED_D)
    o = load_rows(out + head * D, query_row, C, query_valid, D, PADDED_D)
    # Padding queries stand for the window's last token, so this read needs no mask.
    query_lse = tl.load(lse + query_row * num_heads + head)
    query_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + query_row * num_heads + head, query_delta, mask=query_valid)

    dq = tl.zeros((RESIDENT, PADDED_D), tl.float32)
    for first in range(0, N, STREAMED):
        key = first + tl.arange(0, STREAMED)
        key_row, key_region = _token_rows(window, key, H, W, shift_y, shift_x, WINDOW_H, WINDOW_W, GRID, SHIFTED)
        k = load_rows(qkv + part_stride, key_row, token_stride, key < N, D, PADDED_D)
        v = load_rows(qkv + 2 * part_stride, key_row, token_stride, key < N, D, PADDED_D)
        bias_tile = _load_bias(bias, query, key, BIAS_SIDE, BIASED)
        scores = _masked_scores(q, k, bias_tile, query_region, key, key_region, scale, N, SHIFTED, PRECISION)
        weights = tl.exp2(scores - query_lse[:, None])
        dscores = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - query_delta[:, None])
        dq += tl.dot(dscores.to(k.dtype), k, input_precision=PRECISION)
    store_rows(dqkv + head * D, query_row, 3 * C, query_valid, dq * scale, D, PADDED_D)


@triton.jit
def backward_keys(
    qkv, bias, dout, lse, delta, dqkv,
    scale, token_stride, part_stride, dout_stride, tiles_per_window, num_heads, H, W, shift_y, shift_x,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, GRID: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BIAS_SIDE: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the keys' and the values' parts of `dqkv` for a tile of keys of one window and one head.

    The grid has num_windows * num_heads * tiles_per_window programs. A program loops over all queries of its window,
    and reads `delta`, which `backward_queries` has written.
    """
    scale = tl.cast(scale, tl.float32)
    N: tl.constexpr = WINDOW_H * WINDOW_W
    C = num_heads * D
    window, head, tile = _program_indices(tiles_per_window, num_heads)  # pyright: ignore[reportGeneralTypeIssues]
    qkv += head * D
    dout += head * D
    bias += head * BIAS_SIDE * BIAS_SIDE

    key = tile * RESIDENT + tl.arange(0, RESIDENT)
    key_valid = key < N
    key_row, key_region = _token_rows(window, key, H, W, shift_y, shift_x, WINDOW_H, WINDOW_W, GRID, SHIFTED)
    k = load_rows(qkv + part_stride, key_row, token_stride, key_valid, D, PADDED_D)
    v = load_rows(qkv + 2 * part_stride, key_row, token_stride, key_valid, D, PADDED_D)

    dk = tl.zeros((RESIDENT, PADDED_D), tl.float32)
    dv = tl.zeros((RESIDENT, PADDED_D), tl.float32)
    for first in range(0, N, STREAMED):
        query = first + tl.arange(0, STREAMED)
        query_valid = query < N
        query_row, query_region = _token_rows(window, query, H, W, shift_y, shift_x, WINDOW_H, WINDOW_W, GRID, SHIFTED)  # pyright: ignore[reportGeneralTypeIssues]
        q = load_rows(qkv, query_row, token_stride, query_valid, D, PADDED_D)
        do = load_rows(dout, query_row, dout_stride, query_valid, D, PADDED_D)
        # An infinite log-sum-exp makes the weights of padding queries 0.
        query_lse = tl.load(lse + query_row * num_heads + head, mask=query_valid, other=float("inf"))
        query_delta = tl.load(delta + query_row * num_heads + head, mask=query_valid, other=0.0)
        bias_tile = _load_bias(bias, query, key, BIAS_SIDE, BIASED)
        scores = _masked_scores(q, k, bias_tile, query_region, key, key_region, scale, N, SHIFTED, PRECISION)
        weights = tl.exp2(scores - query_lse[:, None])
        dv += tl.dot(tl.trans(weights.to(do.dtype)), do, input_precision=PRECISION)
        dscores = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - query_delta[:, None])
        dk += tl.dot(tl.trans(dscores.to(q.dtype)), q, input_precision=PRECISION)
    store_rows(dqkv + C + head * D, key_row, 3 * C, key_valid, dk * scale, D, PADDED_D)
    store_rows(dqkv + 2 * C + head * D, key_row, 3 * C, key_valid, dv, D, PADDED_D)


@triton.jit
def backward_bias(
    qkv, bias, dout, lse, delta, partial_dbias,
    scale, token_stride, part_stride, dout_stride, num_windows, windows_per_program, num_heads, H, W, shift_y, shift_x,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, GRID: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BIAS_SIDE: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of one RESIDENT x STREAMED tile (queries x keys) of one head's bias over a strip of windows.

    The grid has ceil(num_windows / windows_per_program) * num_heads * (BIAS_SIDE / RESIDENT) * (BIAS_SIDE / STREAMED)
    programs. A program loops over a strip of windows_per_program windows, and reads `delta`, which `backward_queries`
    has written.
    """
    scale = tl.cast(scale, tl.float32)
    N: tl.constexpr = WINDOW_H * WINDOW_W
    strip, head, tile = _program_indices((BIAS_SIDE // RESIDENT) * (BIAS_SIDE // STREAMED), num_heads)  # pyright: ignore[reportGeneralTypeIssues]
    qkv += head * D
    dout += head * D
    bias += head * BIAS_SIDE * BIAS_SIDE

    query = tile // (BIAS_SIDE // STREAMED) * RESIDENT + tl.arange(0, RESIDENT)
    key = tile % (BIAS_SIDE // STREAMED) * STREAMED + tl.arange(0, STREAMED)
    query_valid = query < N
    bias_tile = _load_bias(bias, query, key, BIAS_SIDE, BIASED)
    dbias_sum = tl.zeros((RESIDENT, STREAMED), tl.float32)
    first_window = strip * windows_per_program
    for window in range(first_window, tl.minimum(first_window + windows_per_program, num_windows)):
        query_row, query_region = _token_rows(window, query, H, W, shift_y, shift_x, WINDOW_H, WINDOW_W, GRID, SHIFTED)  # pyright: ignore[reportGeneralTypeIssues]
        key_row, key_region = _token_rows(window, key, H, W, shift_y, shift_x, WINDOW_H, WINDOW_W, GRID, SHIFTED)
        q = load_rows(qkv, query_row, token_stride, query_valid, D, PADDED_D)
        do = load_rows(dout, query_row, dout_stride, query_valid, D, PADDED_D)
        k = load_rows(qkv + part_stride, key_row, token_stride, key < N, D, PADDED_D)
        v = load_rows(qkv + 2 * part_stride, key_row, token_stride, key < N, D, PADDED_D)
        # Padding queries stand for the window's last token, so these reads need no mask. The sums of padding queries
        # have no meaning, and the caller discards them.
        query_lse = tl.load(lse + query_row * num_heads + head)
        query_delta = tl.load(delta + query_row * num_heads + head)
        scores = _masked_scores(q, k, bias_tile, query_region, key, key_region, scale, N, SHIFTED, PRECISION)
        weights = tl.exp2(scores - query_lse[:, None])
        dbias_sum += weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - query_delta[:, None])
    offset = (strip * num_heads + head).to(tl.int64) * BIAS_SIDE * BIAS_SIDE
    tl.store(partial_dbias + offset + query[:, None] * BIAS_SIDE + key[None, :], dbias_sum)
