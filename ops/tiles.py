"""Attention in tiles: the queries of a tile of the map attend to the keys of one box, each to those that a rule allows.

Rules count along H and along W alone, and each gives a `QueryTiles`: sliding windows (`sliding_tiles`), windows of a
partition (`window_tiles`) and neighbourhoods (`ops/neighborhood.py`). No matrix between all tokens is built.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.functional import biased_scores_attention, merge_heads, split_heads, window_attention
from ops.windows import from_windows, to_windows
from retinue.utils.arithmetic import ceil_div


class QueryTiles(NamedTuple):
    """Tiles of the queries along one side of n tokens, each with T queries and a box of K keys.

    Attributes:
        queries: Position on the side of each query: (tiles, T).
        keys: Position on the side of each key of the tile's box: (tiles, K).
        attended: True where a query attends to a key: (tiles, T, K).
        offsets: Offset from query to key, correct where `attended`, else clamped to the bias table: (tiles, T, K).
        order: Index of each position of the side among the queries of all tiles: (n,).
    """

    queries: Tensor
    keys: Tensor
    attended: Tensor
    offsets: Tensor
    order: Tensor


def sliding_tiles(n: int, reach: int, tile: int, device: torch.device) -> QueryTiles:
    """Return the tiles of a side on which each token attends to the tokens at most `reach` away, cut off at the ends.

    Args:
        n: Number of tokens along the side.
        reach: Largest distance from a query to its keys.
        tile: Number of queries in a tile.
        device: Device of the result.
    """
    tile = min(tile, n)
    box = min(tile + 2 * reach, n)
    first = torch.arange(0, n, tile, device=device).unsqueeze(1)
    # Beyond the end of the side, its last query is repeated
    query = (first + torch.arange(tile, device=device)).clamp(max=n - 1)
    key = (first - reach).clamp(0, n - box) + torch.arange(box, device=device)
    offsets = key.unsqueeze(1) - query.unsqueeze(2)
    attended = offsets.abs() <= reach
    return QueryTiles(query, key, attended, offsets.clamp(-reach, reach), torch.arange(n, device=device))


def window_tiles(n: int, window: int, shift: int, wrap: bool, device: torch.device) -> QueryTiles:
    """Return the tiles of a side whose tokens attend to the tokens of their window.

    The side is rolled towards its start by `shift` tokens. Windows that reach beyond its end hold fewer tokens.

    Args:
        n: Number of tokens along the side.
        window: Number of tokens of a window.
        shift: Number of tokens by which the side is rolled, from 0 to n - 1.
        wrap: Let tokens attend to each other that the roll brings together from opposite ends. Then the side is rolled
            before it is padded to whole windows, else after.
        device: Device of the result.
    """
    windows = ceil_div(n, window)
    length = n if wrap else windows * window
    place = torch.arange(windows * window, device=device).view(windows, window)
    position = (place + shift) % length
    on_map = (place if wrap else position) < n
    rolled = torch.zeros_like(on_map) if wrap else place >= length - shift
    # A place beyond the map asks for all keys, since a softmax over none would be NaN; its result is not used
    attended = (on_map.unsqueeze(1) & (rolled.unsqueeze(1) == rolled.unsqueeze(2))) | ~on_map.unsqueeze(2)
    inside = torch.arange(window, device=device)
    offsets = (inside - inside.unsqueeze(1)).expand(windows, -1, -1)
    token = position.clamp(max=n - 1)
    return QueryTiles(token, token, attended, offsets, (torch.arange(n, device=device) - shift) % length)


def pairs(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Make what `rows` (row tiles, T, K) and `columns` (column tiles, T, K) hold broadcast to each other.

    The common shape is (row tiles, column tiles, T, T, K, K), with the row before the column.
    """
    return rows[:, None, :, None, :, None], columns[None, :, None, :, None, :]


def flatten_pairs(x: Tensor) -> Tensor:
    """Turn (row tiles, column tiles, T, T, K, K) into (P, 1, T * T, K * K)."""
    return x.flatten(4).flatten(2, 3).flatten(0, 1).unsqueeze(1)


def relative_bias(table: Tensor, rows: QueryTiles, columns: QueryTiles) -> Tensor:
    """Return the bias of each pair of query and key, (P, heads, T * T, K * K).

    Args:
        table: Bias of each offset from query to key, with offset 0 in the middle: (heads, 2a + 1, 2b + 1).
        rows: Tiles along H, with offsets from -a to a.
        columns: Tiles along W, with offsets from -b to b.
    """
    for axis, tiles in ((2, columns), (1, rows)):
        index = tiles.offsets + table.shape[axis] // 2
        table = table.index_select(axis, index.flatten()).unflatten(axis, index.shape)
    # (heads, row tiles, T, K, column tiles, T, K)
    return table.permute(1, 4, 0, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(0, 1)


def attend_in_tiles(
    qkv: Tensor,
    num_heads: int,
    rows: QueryTiles,
    columns: QueryTiles,
    attended: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    shared: Tensor | None = None,
    shared_mask: Tensor | None = None,
) -> Tensor:
    """Compute attention from the queries of each tile to the keys of its box and to shared keys, in one softmax.

    Args:
        qkv: Queries, keys and values (B, H, W, 3C).
        num_heads: Number of heads.
        rows: Tiles along H.
        columns: Tiles along W.
        attended: True where a query attends to a key; broadcasts to (row tiles, column tiles, T, T, K, K). By default
            where it does so along both sides.
        bias: Added to the scores between query and key; broadcasts to (P, heads, T * T, K * K).
        scale: Factor on the scores before the softmax; by default (C / heads)^-0.5.
        shared: More keys and values, for all tiles or for each tile: (B, 1 or P, M, 2C).
        shared_mask: True where the queries of a tile attend to a shared key: (P, M). By default everywhere.

    Returns:
        Tensor (B, H, W, C).
    """
    if attended is None:
        row, column = pairs(rows.attended, columns.attended)
        attended = row & column
    attended = flatten_pairs(attended)
    mask = torch.zeros_like(attended, dtype=qkv.dtype).masked_fill_(~attended, -torch.inf)
    if bias is not None:
        mask = mask + bias
    q, k, v = qkv.chunk(3, dim=-1)
    q = split_heads(gather_tiles(q, rows.queries, columns.queries), num_heads)  # (B, P, heads, T * T, D)
    k, v = (split_heads(gather_tiles(t, rows.keys, columns.keys), num_heads) for t in (k, v))
    if shared is not None:
        tiles, number = q.shape[1], shared.shape[2]
        more = (split_heads(t, num_heads).expand(-1, tiles, -1, -1, -1) for t in shared.chunk(2, dim=-1))
        k, v = (torch.cat(pair, dim=-2) for pair in zip((k, v), more, strict=True))
        mask = F.pad(mask, (0, number))
        if shared_mask is not None:
            hidden = F.pad(~shared_mask, (mask.shape[-1] - number, 0))
            mask = mask.masked_fill(hidden[:, None, None], -torch.inf)
    out = biased_scores_attention(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    grid, size = (len(rows.queries), len(columns.queries)), (rows.queries.numel(), columns.queries.numel())
    return from_windows(merge_heads(out), grid, size).index_select(1, rows.order).index_select(2, columns.order)


def gather_tiles(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Gather the tokens of each tile from a map (B, H, W, C): (B, P, T * T, C).

    Args:
        x: Map (B, H, W, C).
        rows: Row of each token of each row of tiles: (row tiles, T).
        columns: Column of each token of each column of tiles: (column tiles, T).
    """
    x = x.index_select(1, rows.flatten()).index_select(2, columns.flatten())
    return to_windows(x, (len(rows), len(columns)))


def ragged_window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    wrap: bool = False,
) -> Tensor:
    """Compute `window_attention` on a map of any size: windows that reach beyond the map hold fewer tokens.

    Args:
        qkv: Queries, keys and values (B, H, W, 3, C).
        bias: Added to the scores of the N = window[0] * window[1] tokens of every window: (heads, N, N), or None.
        num_heads: Number of heads.
        window: Size of a window in tokens along H and W.
        shift: Number of tokens by which the map is rolled up and left, at least 0 and less than the map's size.
        wrap: Let tokens attend to each other that the roll brings together from opposite sides of the map.

    Returns:
        Tensor (B, H, W, C).
    """
    size = qkv.shape[1:3]
    if size[0] % window[0] == 0 and size[1] % window[1] == 0:
        if not wrap or shift == (0, 0):
            return window_attention(qkv, bias, num_heads, window, shift)
        rolled = qkv.roll((-shift[0], -shift[1]), dims=(1, 2))
        return window_attention(rolled, bias, num_heads, window).roll(shift, dims=(1, 2))
    rows, columns = (window_tiles(n, w, s, wrap, qkv.device) for n, w, s in zip(size, window, shift, strict=True))
    return attend_in_tiles(qkv.flatten(-2), num_heads, rows, columns, bias=bias)
