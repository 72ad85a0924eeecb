"""Triton kernels of multi-scale deformable attention, which `ops.kernels.deformable_attention` launches.

Arguments of the kernels, for B images of N tokens in all levels together, Q queries, and heads of D channels. All
tensors are contiguous:

    value, dvalue                (B, N, num_heads, D): the values and their gradient
    shapes                       (levels, 2), integers: height and width of each level's map
    locations, dlocations        (B, Q, num_heads, levels, points, 2): x and y of each sample, and their gradients
    weights, dweights            (B, Q, num_heads, levels, points): weights of the samples, and their gradients
    out, dout                    (B, Q, num_heads, D): the output and its gradient
    cells                        (B, Q, num_heads, levels, points), int32: number of the cell that a sample lies in
    order                        (B * Q * num_heads * levels * points,): the samples in ascending order of their cells
    bounds                       (4 * B * num_heads * N + 1,): position in `order` of the first sample of each cell
    queries, tokens              Q, N
    D, PADDED_D                  number of channels per head, and this number after padding for `tl.arange`
    POINTS                       number of points after padding
    QUERIES, SAMPLES             number of queries of a program, and number of samples per iteration of its loop

A cell is the square between four tokens; the cells of a map of H x W tokens have H + 1 rows and W + 1 columns, because
samples beyond the first and the last tokens also have a part of these. That is at most 4 * H * W cells, so cell c of
level l of head h of image b has the number (b * num_heads + h) * 4 * N + 4 * (first token of level l) + c. Samples from
which no token has a part are in cell 4 * B * num_heads * N.
"""

import triton
import triton.language as tl

from ops.kernels.rows import load_rows, store_rows


@triton.jit
def _program_indices(queries, num_heads, QUERIES: tl.constexpr):
    """Return image, head and first query of this program. Heads vary fastest: they read near values and locations."""
    program = tl.program_id(0)
    tiles = tl.cdiv(queries, QUERIES)
    image = (program // (num_heads * tiles)).to(tl.int64)
    return image, program % num_heads, program // num_heads % tiles * QUERIES


@triton.jit
def _samples_of_level(locations, weights, index, valid, H, W):
    """Return x and y of samples in tokens, relative to the first token, and their weights; 0 where not valid."""
    x = tl.load(locations + 2 * index, mask=valid, other=0.0).to(tl.float32) * W - 0.5
    y = tl.load(locations + 2 * index + 1, mask=valid, other=0.0).to(tl.float32) * H - 0.5
    return x, y, tl.load(weights + index, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _clamped(x, length):
    """Return float coordinates as integers from 0 to length - 1. Triton 3.6 fails to compile `tl.where` here."""
    return tl.minimum(tl.maximum(x, 0.0), (length - 1).to(tl.float32)).to(tl.int32)


@triton.jit
def _load_corner(base, stride, x, y, valid, H, W, D: tl.constexpr, PADDED_D: tl.constexpr):
    """Load the tokens (rows, PADDED_D) in column x and row y of a map, in float32; x and y are floats.

    Values are 0 outside the map. Coordinates are compared as floats, since large ones do not fit an integer.
    """
    inside = valid & (x >= 0) & (x < W) & (y >= 0) & (y < H)
    row = _clamped(y, H).to(tl.int64) * W + _clamped(x, W)
    return load_rows(base, row, stride, inside, D, PADDED_D).to(tl.float32)


@triton.jit
def forward(
    value, shapes, locations, weights, out, queries, tokens, num_heads, levels, points,
    D: tl.constexpr, PADDED_D: tl.constexpr, POINTS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Compute `out` of a tile of queries."""
    image, head, first = _program_indices(queries, num_heads, QUERIES)  # pyright: ignore[reportGeneralTypeIssues]
    sample = tl.arange(0, QUERIES * POINTS)
    query, point = first + sample // POINTS, sample % POINTS
    valid = (query < queries) & (point < points)
    first_sample = ((image * queries + query) * num_heads + head) * levels
    base = value + (image * tokens * num_heads + head) * D
    acc = tl.zeros((QUERIES * POINTS, PADDED_D), tl.float32)
    for level in range(levels):
        H, W = tl.load(shapes + 2 * level).to(tl.int32), tl.load(shapes + 2 * level + 1).to(tl.int32)
        x, y, weight = _samples_of_level(locations, weights, (first_sample + level) * points + point, valid, H, W)  # pyright: ignore[reportGeneralTypeIssues]
        left, top = tl.floor(x), tl.floor(y)
        right_share, bottom_share = x - left, y - top
        for corner in tl.static_range(4):
            share_y = bottom_share if corner // 2 == 1 else 1 - bottom_share
            share_x = right_share if corner % 2 == 1 else 1 - right_share
            corner_value = _load_corner(
                base, num_heads * D, left + corner % 2, top + corner // 2, valid, H, W, D, PADDED_D
            )
            acc += (weight * share_y * share_x)[:, None] * corner_value
        base += (H * W).to(tl.int64) * num_heads * D
    result = tl.sum(tl.reshape(acc, (QUERIES, POINTS, PADDED_D)), 1)
    row = first + tl.arange(0, QUERIES)
    out_base = out + (image * queries * num_heads + head) * D
    store_rows(out_base, row.to(tl.int64), num_heads * D, row < queries, result, D, PADDED_D)


@triton.jit
def backward_samples(
    value, shapes, locations, weights, dout, dlocations, dweights, cells,
    queries, tokens, num_heads, levels, points, images,
    D: tl.constexpr, PADDED_D: tl.constexpr, POINTS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Compute `dlocations`, `dweights` and `cells` of a tile of queries."""
    image, head, first = _program_indices(queries, num_heads, QUERIES)  # pyright: ignore[reportGeneralTypeIssues]
    sample = tl.arange(0, QUERIES * POINTS)
    query, point = first + sample // POINTS, sample % POINTS
    valid = (query < queries) & (point < points)
    first_sample = ((image * queries + query) * num_heads + head) * levels
    base = value + (image * tokens * num_heads + head) * D
    dout_base = dout + (image * queries * num_heads + head) * D
    do = load_rows(dout_base, query.to(tl.int64), num_heads * D, valid, D, PADDED_D).to(tl.float32)
    first_token = 0
    for level in range(levels):
        H, W = tl.load(shapes + 2 * level).to(tl.int32), tl.load(shapes + 2 * level + 1).to(tl.int32)
        index = (first_sample + level) * points + point
        x, y, weight = _samples_of_level(locations, weights, index, valid, H, W)  # pyright: ignore[reportGeneralTypeIssues]
        left, top = tl.floor(x), tl.floor(y)
        right_share, bottom_share = x - left, y - top
        # Derivatives of the output by the bilinear shares of the four tokens, for a weight of 1
        stride = num_heads * D
        top_left = tl.sum(_load_corner(base, stride, left, top, valid, H, W, D, PADDED_D) * do, 1)
        top_right = tl.sum(_load_corner(base, stride, left + 1, top, valid, H, W, D, PADDED_D) * do, 1)
        bottom_left = tl.sum(_load_corner(base, stride, left, top + 1, valid, H, W, D, PADDED_D) * do, 1)
        bottom_right = tl.sum(_load_corner(base, stride, left + 1, top + 1, valid, H, W, D, PADDED_D) * do, 1)
        above = top_left + right_share * (top_right - top_left)
        below = bottom_left + right_share * (bottom_right - bottom_left)
        along_top, along_bottom = top_right - top_left, bottom_right - bottom_left
        dx = along_top + bottom_share * (along_bottom - along_top)
        tl.store(dweights + index, (above + bottom_share * (below - above)).to(dweights.dtype.element_ty), mask=valid)
        tl.store(dlocations + 2 * index, (weight * dx * W).to(dlocations.dtype.element_ty), mask=valid)
        dy = (weight * (below - above) * H).to(dlocations.dtype.element_ty)
        tl.store(dlocations + 2 * index + 1, dy, mask=valid)
        inside = (left >= -1) & (left < W) & (top >= -1) & (top < H)
        row, column = _clamped(top + 1, H + 1), _clamped(left + 1, W + 1)
        first_cell = (image.to(tl.int32) * num_heads + head) * (4 * tokens) + 4 * first_token
        cell = tl.where(inside, first_cell + row * (W + 1) + column, images * num_heads * tokens * 4)
        tl.store(cells + index, cell, mask=valid)
        base += (H * W).to(tl.int64) * stride
        first_token += H * W


@triton.jit
def backward_values(
    shapes, locations, weights, dout, order, bounds, dvalue, tokens, num_heads, levels, points,
    D: tl.constexpr, PADDED_D: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Compute `dvalue` of one token and head: a sum over the samples of the four cells around the token."""
    program = tl.program_id(0)
    head, token = program % num_heads, program // num_heads % tokens
    image = program // num_heads // tokens
    first_token, H, W = 0, 1, 1
    start = 0
    for level in range(levels):
        height, width = tl.load(shapes + 2 * level).to(tl.int32), tl.load(shapes + 2 * level + 1).to(tl.int32)
        here = (token >= start) & (token < start + height * width)
        first_token, H, W = tl.where(here, start, first_token), tl.where(here, height, H), tl.where(here, width, W)
        start += height * width
    row, column = (token - first_token) // W, (token - first_token) % W
    first_cell = (image * num_heads + head) * (4 * tokens) + 4 * first_token
    samples_per_query = num_heads * levels * points
    acc = tl.zeros((SAMPLES, PADDED_D), tl.float32)
    for below in range(2):
        # Samples left of the token and samples right of the token are in consecutive cells
        cell = first_cell + (row + below) * (W + 1) + column
        end = tl.load(bounds + cell + 2)
        for first in range(tl.load(bounds + cell), end, SAMPLES):
            position = first + tl.arange(0, SAMPLES)
            valid = position < end
            sample = tl.load(order + position, mask=valid, other=0).to(tl.int64)
            x, y, weight = _samples_of_level(locations, weights, sample, valid, H, W)  # pyright: ignore[reportGeneralTypeIssues]
            share = weight * (1 - tl.abs(x - column)) * (1 - tl.abs(y - row))
            do = load_rows(dout + head * D, sample // samples_per_query, num_heads * D, valid, D, PADDED_D)
            acc += tl.where(valid, share, 0.0)[:, None] * do.to(tl.float32)
    channel = tl.arange(0, PADDED_D)
    result = tl.sum(acc, 0).to(dvalue.dtype.element_ty)
    base = dvalue + ((image.to(tl.int64) * tokens + token) * num_heads + head) * D
    tl.store(base + channel, result, mask=channel < D)
