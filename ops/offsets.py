"""Attention of each token to the keys at fixed offsets from it, such as bands and powers of two."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.precision import at_least_float32
from retinue.utils.arithmetic import ceil_div

# Largest map, in tokens, for which a mask over all pairs of tokens is faster than the loops over offsets
MAX_MASKED_TOKENS = 256


def offset_mask(allowed: Tensor, size: Sequence[int]) -> Tensor:
    """Return the mask (H * W, H * W) of the keys that each token of a map attends to.

    Args:
        allowed: True for offsets (dy, dx) that are attended to, at index (dy + H - 1, dx + W - 1): (2H - 1, 2W - 1).
        size: Size (H, W) of the map.
    """
    rows, columns = (torch.arange(n, device=allowed.device) for n in size)
    rows, columns = (index - index[:, None] + len(index) - 1 for index in (rows, columns))
    return allowed[rows[:, None, :, None], columns[None, :, None, :]].flatten(2).flatten(0, 1)


def offset_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Sequence[tuple[int, int]],
    bias: Tensor | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute attention from each token to the tokens at some offsets, those outside the map excepted.

    One product of maps is computed for each offset, so neither keys nor values are copied.

    Args:
        q: Queries (B, heads, H, W, D).
        k: Keys (B, heads, H, W, D).
        v: Values (B, heads, H, W, D).
        offsets: Offsets (dy, dx) from query to key, all different and smaller than the map; (0, 0) is one of them.
        bias: Added to the scores, (heads, number of offsets); by default none.
        extra: Keys and values (B, heads, E, D) of further tokens, which all tokens attend to.

    Returns:
        Tensor (B, heads, H, W, D).
    """
    H, W, D = q.shape[2:]
    q = q * D**-0.5
    scores = []
    for dy, dx in offsets:
        (y, x), (to_y, to_x), margins = overlap((dy, dx), (H, W))
        near_q, near_k = q[:, :, y, x], k[:, :, to_y, to_x]
        # Operations are counted on the meta device, where only products of matrices count
        product = near_q.unsqueeze(-2) @ near_k.unsqueeze(-1) if q.is_meta else (near_q * near_k).sum(-1)
        scores.append(F.pad(product.view(near_q.shape[:-1]), margins, value=-torch.inf))
    weights = torch.stack(scores, dim=-1)
    if bias is not None:
        weights = weights + bias[:, None, None].to(weights.dtype)
    if extra is not None:
        weights = torch.cat([torch.einsum("bhyxd,bhed->bhyxe", q, extra[0]), weights], dim=-1)
    (weights,) = at_least_float32(weights)
    weights = weights.softmax(-1).to(v.dtype)
    number = 0 if extra is None else extra[0].shape[2]
    out = torch.zeros_like(v) if extra is None else torch.einsum("bhyxe,bhed->bhyxd", weights[..., :number], extra[1])
    for (dy, dx), weight in zip(offsets, weights[..., number:].unbind(-1), strict=True):
        (y, x), (to_y, to_x), margins = overlap((dy, dx), (H, W))
        near, values = weight[:, :, y, x].unsqueeze(-1), v[:, :, to_y, to_x]
        product = (near.unsqueeze(-1) @ values.unsqueeze(-2)).squeeze(-2) if q.is_meta else near * values
        out = out + F.pad(product, (0, 0, *margins))
    return out


def overlap(offset: tuple[int, int], size: tuple[int, int]) -> tuple[list[slice], list[slice], tuple[int, ...]]:
    """Return the queries whose key at an offset is on the map, these keys, and the margins without such queries.

    Queries and keys are slices along H and W, and the margins are in the order of `F.pad`.
    """
    queries = [slice(max(0, -d), n - max(0, d)) for d, n in zip(offset, size, strict=True)]
    keys = [slice(max(0, d), n - max(0, -d)) for d, n in zip(offset, size, strict=True)]
    (dy, dx) = offset
    return queries, keys, (max(0, -dx), max(0, dx), max(0, -dy), max(0, dy))


def band_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    reach: Sequence[int],
    extra: tuple[Tensor, Tensor] | None = None,
    first_row: int = 0,
) -> Tensor:
    """Compute attention from each token to bands of rows above and below it, those outside the map excepted.

    One product of matrices is computed for each distance between rows, between tiles of queries of one row and the keys
    of the other row near them.

    Args:
        q: Queries (B, heads, H, W, D).
        k: Keys (B, heads, H, W, D).
        v: Values (B, heads, H, W, D).
        allowed: True for offsets (dy, dx) that are attended to, as in `offset_mask`.
        reach: Maximum |dx| that is allowed at each distance |dy| from 0 to H - 1; negative where none is.
        extra: Keys and values (B, heads, E, D) of further tokens, which all tokens attend to.
        first_row: Index of the first row of keys; earlier rows are not attended to.

    Returns:
        Tensor (B, heads, H, W, D).
    """
    B, heads, H, W, D = q.shape
    if H * W <= MAX_MASKED_TOKENS and not q.is_meta:
        mask = offset_mask(allowed, (H, W)) & (torch.arange(H * W, device=q.device) >= first_row * W)
        k, v = k.flatten(2, 3), v.flatten(2, 3)
        if extra is not None:
            k, v = torch.cat([extra[0], k], dim=2), torch.cat([extra[1], v], dim=2)
            mask = F.pad(mask, (extra[0].shape[2], 0), value=True)
        return F.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=mask).view(q.shape)
    # Rows first, so that a range of rows need not be copied
    rows = [t.movedim(2, 0).flatten(1, 2) for t in (q * D**-0.5, k, v)]  # (H, B * heads, W, D)
    parts = [(dy, reach[abs(dy)]) for dy in range(1 - H, H) if reach[abs(dy)] >= 0 and H - max(0, -dy) > first_row]
    bands = {width: make_band(rows, width) for width in {width for _, width in parts}}
    scores = []
    for dy, width in parts:
        (queries, keys), band = row_ranges(dy, H, first_row), bands[width]
        score = band.q[queries] @ band.k[keys].transpose(-2, -1)  # (rows, B * heads, tiles, T, K)
        score = score.masked_fill(~(allowed[dy + H - 1][band.offsets] & band.real), -torch.inf).flatten(2, 3)[:, :, :W]
        scores.append(F.pad(score, (0, 0, 0, 0, 0, 0, queries.start, H - queries.stop), value=-torch.inf))
    if extra is not None:
        extra_k, extra_v = (t.flatten(0, 1) for t in extra)
        scores.append(rows[0] @ extra_k.transpose(-2, -1))
    (weights,) = at_least_float32(torch.cat(scores, dim=-1))
    weights = weights.softmax(-1).to(v.dtype).split([score.shape[-1] for score in scores], dim=-1)
    out = torch.zeros_like(rows[2]) if extra is None else weights[-1] @ extra_v
    for (dy, width), weight in zip(parts, weights, strict=extra is None):
        (queries, keys), band = row_ranges(dy, H, first_row), bands[width]
        tiles, tile = band.q.shape[2:4]
        weight = F.pad(weight[queries], (0, 0, 0, tiles * tile - W)).unflatten(2, (tiles, tile))
        values = (weight @ band.v[keys]).flatten(2, 3)[:, :, :W]
        out = out + F.pad(values, (0, 0, 0, 0, 0, 0, queries.start, H - queries.stop))
    return out.unflatten(1, (B, heads)).movedim(0, 2)


class Band(NamedTuple):
    """Tiles of the queries of each row, and the K keys near each tile, for windows of one width.

    Attributes:
        q: Queries (H, n, tiles, T, D), zero-padded to whole tiles.
        k: Keys (H, n, tiles, K, D), zero-padded where they are not on the map.
        v: Values (H, n, tiles, K, D).
        offsets: Offset from query to key plus W - 1, cut to the map's offsets: (tiles, T, K).
        real: True for keys on the map: (tiles, 1, K).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    offsets: Tensor
    real: Tensor


def make_band(rows: Sequence[Tensor], width: int) -> Band:
    """Return the band of windows |dx| <= `width` for queries, keys and values (H, n, W, D)."""
    q, k, v = rows
    W, tile, side = q.shape[2], max(4, 2 * width), width
    if tile + 2 * side >= W:
        tile, side = W, 0
    tiles = ceil_div(W, tile)
    margin = tiles * tile - W
    k, v = (F.pad(t, (0, 0, side, side + margin)).unfold(2, tile + 2 * side, tile).transpose(-2, -1) for t in (k, v))
    start = tile * torch.arange(tiles, device=q.device).view(-1, 1, 1)
    position = start + torch.arange(tile, device=q.device).unsqueeze(1)
    key = start - side + torch.arange(tile + 2 * side, device=q.device)
    offsets = (key - position).clamp(1 - W, W - 1) + W - 1
    return Band(F.pad(q, (0, 0, 0, margin)).unflatten(2, (tiles, tile)), k, v, offsets, (key >= 0) & (key < W))


def row_ranges(dy: int, H: int, first_row: int) -> tuple[slice, slice]:
    """Return the rows of queries whose keys, `dy` rows below, are on the map from `first_row` on, and these rows."""
    return slice(max(0, first_row - dy), H - max(0, dy)), slice(max(first_row, dy), H - max(0, -dy))
