"""Blocks of a map, and attention of tokens to the blocks that are chosen for them.

A block is a rectangle of tokens: a tile, a strip of rows or columns, or a run of consecutive tokens if the map is first
viewed as one row.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.windows import from_windows, pad_to_multiple, to_windows
from retinue.utils.arithmetic import ceil_div

Pair = tuple[int, int]

# Largest map, in tokens, for which block attention masks dense attention instead of gathering the chosen blocks. At
# about this size both are as fast: measured on the CPU, forward and backward, with 2 to 4 chosen tiles of 7 x 7 tokens.
MAX_MASKED_TOKENS = 256


class Blocks(NamedTuple):
    """Cut of maps into M blocks of L tokens; blocks, and the tokens of a block, are in row-major order.

    The map is zero-padded on the right and at the bottom to whole blocks, so every block holds a token of the map.

    Attributes:
        size: Size (H, W) of the map in tokens.
        block: Size (h, w) of a block in tokens.
    """

    size: Pair
    block: Pair

    @property
    def grid(self) -> Pair:
        """Number of blocks along H and W."""
        return ceil_div(self.size[0], self.block[0]), ceil_div(self.size[1], self.block[1])

    @property
    def number(self) -> int:
        """Number of blocks M."""
        return self.grid[0] * self.grid[1]

    @property
    def padded(self) -> bool:
        """True if the blocks do not fit the map."""
        return self.size != self.whole().size

    def split(self, x: Tensor, num_heads: int) -> Tensor:
        """Cut a map (B, H, W, heads * D) into blocks and heads: (B, heads, M, L, D)."""
        return to_windows(pad_to_multiple(x, self.block), self.grid).unflatten(-1, (num_heads, -1)).movedim(3, 1)

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`: (B, heads, M, L, D) back to (B, H, W, heads * D), without the padding."""
        x = from_windows(x.movedim(1, 3).flatten(3), self.grid, self.whole().size)
        return x[:, : self.size[0], : self.size[1]]

    def real(self, device: torch.device | str) -> Tensor:
        """Return the mask of the tokens that are on the map: (M, L)."""
        on_map = torch.ones(1, *self.size, 1, dtype=torch.bool, device=device)
        return to_windows(pad_to_multiple(on_map, self.block), self.grid)[0, ..., 0]

    def whole(self) -> "Blocks":
        """Return the same blocks of the padded map, whose tokens all count."""
        return Blocks((self.grid[0] * self.block[0], self.grid[1] * self.block[1]), self.block)

    def distances(self, device: torch.device | str) -> Tensor:
        """Return the larger of the distances along H and W between blocks, in blocks: (M, M)."""
        rows = torch.arange(self.grid[0], device=device).repeat_interleave(self.grid[1])
        columns = torch.arange(self.grid[1], device=device).repeat(self.grid[0])
        return torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs())

    def means(self, x: Tensor) -> Tensor:
        """Average (..., M, L, D) over the tokens of each block that are on the map: (..., M, D)."""
        if not self.padded:
            return x.mean(-2)
        real = self.real(x.device).to(x.dtype)
        return torch.einsum("...mld,ml->...md", x, real / real.sum(-1, keepdim=True))


def fit_block(block: Pair, size: Pair) -> Blocks:
    """Return the cut into blocks of `block` tokens along H and W; along a shorter side the block is the whole side."""
    return Blocks(size, (min(block[0], size[0]), min(block[1], size[1])))


def top_blocks(scores: Tensor, count: int) -> Tensor:
    """Return the mask of the `count` blocks with the largest scores (..., M) of each row, or of all if M is less.

    The first of several blocks with equal scores are taken, so that the choice is the same on all devices.
    """
    index = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    real: Tensor | None = None,
    count: int | None = None,
    causal: bool = False,
    extra: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute attention of groups of queries to the key blocks that are chosen for each group.

    The work and the memory are proportional to the number of chosen pairs of group and block, except on maps of at most
    `MAX_MASKED_TOKENS` tokens, where masked dense attention is faster, and where `count` is the number of all blocks.

    Args:
        q: Queries (B, heads, G, Q, D): G groups of Q queries, such as blocks, or single tokens with Q = 1.
        k: Keys (B, heads, M, L, D) of M blocks.
        v: Values (B, heads, M, L, D).
        chosen: True where a group attends to a block, (..., G, M); broadcasts over B and heads. No row is empty. A
            mask that does not depend on the data is best made on the CPU.
        real: True for keys that are attended to, (M, L), at least one in a block; by default all.
        count: Number of blocks of each group, if it is the same for all. The GPU then need not wait for the number of
            pairs. On the meta device the cost is that of all blocks without it.
        causal: Attend to no key after the query, in the order of the blocks.
        extra: Keys and values (B, heads, E, D) of further tokens, which all queries attend to.

    Returns:
        Tensor (B, heads, G, Q, D).
    """
    B, heads, groups, queries, D = q.shape
    blocks, length = k.shape[2:4]
    small = not q.is_meta and max(groups * queries, blocks * length) <= MAX_MASKED_TOKENS
    if small or count == blocks:
        return masked_attention(q, k, v, None if count == blocks else chosen, real, causal, extra)

    chosen = chosen.expand(B, heads, groups, blocks)
    tiles = tile_pairs(chosen, max(1, length // queries), count, q.device)
    pack = tiles.group.shape[1]
    q = q.flatten(0, 2) * D**-0.5  # (B * heads * G, Q, D)
    tile_q = q.index_select(0, tiles.group.flatten()).view(-1, pack * queries, D)
    tile_k, tile_v = (t.flatten(0, 2).index_select(0, tiles.block) for t in (k, v))  # (tiles, L, D)
    scores = tile_q @ tile_k.transpose(1, 2)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(dtype)
    if real is not None:
        scores = scores.masked_fill(~real[tiles.block % blocks].unsqueeze(1), -torch.inf)
    if causal:
        position = (tiles.group % groups * queries).unsqueeze(-1) + torch.arange(queries, device=q.device)
        key = (tiles.block % blocks * length).unsqueeze(-1) + torch.arange(length, device=q.device)
        scores = scores.masked_fill(key.unsqueeze(1) > position.flatten(1).unsqueeze(-1), -torch.inf)

    # Each tile has its own maximum; the softmax over all tiles of a query is merged from their maxima, sums and values
    peak = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
    weights = (scores - peak).exp()
    values = (weights.to(tile_v.dtype) @ tile_v).to(dtype)
    peak, total, values = (
        t.reshape(-1, queries, t.shape[-1]).index_select(0, tiles.slot) for t in (peak, weights.sum(-1, True), values)
    )  # (pairs, Q, 1 or D)
    top = tiles.reduce(peak, "max")
    if extra is not None:
        extra_scores = (q.view(B * heads, -1, D) @ extra[0].flatten(0, 1).transpose(1, 2)).to(dtype)
        extra_scores = extra_scores.view(q.shape[0], queries, -1)
        top = torch.maximum(top, extra_scores.detach().amax(-1, keepdim=True))
    factor = (peak - top.index_select(0, tiles.owner)).exp()
    total, values = (tiles.reduce(factor * t, "sum") for t in (total, values))
    if extra is not None:
        weights = (extra_scores - top).exp()
        extra_v = extra[1].flatten(0, 1)
        extra_values = (weights.to(extra_v.dtype).view(B * heads, -1, weights.shape[-1]) @ extra_v).to(dtype)
        total, values = total + weights.sum(-1, keepdim=True), values + extra_values.view_as(values)
    return (values / total).to(v.dtype).view(B, heads, groups, queries, D)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor | None,
    real: Tensor | None,
    causal: bool,
    extra: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Compute `block_attention` as dense attention with a mask; without `chosen`, to all blocks."""
    queries, length = q.shape[3], k.shape[3]
    mask = torch.ones(k.shape[2] * length, dtype=torch.bool, device=q.device) if real is None else real.flatten()
    if chosen is not None:
        mask = mask & chosen.to(q.device).repeat_interleave(queries, -2).repeat_interleave(length, -1)
    if causal:
        mask = mask & torch.ones(q.shape[2] * queries, k.shape[2] * length, dtype=torch.bool, device=q.device).tril()
    k, v = k.flatten(2, 3), v.flatten(2, 3)
    if extra is not None:
        k, v = torch.cat([extra[0], k], dim=2), torch.cat([extra[1], v], dim=2)
        mask = F.pad(mask, (extra[0].shape[2], 0), value=True)
    masked = real is not None or chosen is not None or causal
    mask = torch.atleast_2d(mask)
    return F.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=mask if masked else None).view(q.shape)


class Tiles(NamedTuple):
    """Pairs of group and block, and tiles of one block and up to `pack` groups that attend to it.

    Attributes:
        block: Block of each tile among those of all images and heads: (tiles,).
        group: Groups of each tile among those of all images and heads, 0 in unused slots: (tiles, pack).
        slot: Index of each pair in the flattened `group`: (pairs,). The pairs are sorted by their group.
        owner: Group of each pair: (pairs,).
        lengths: Number of pairs of each group, (B * heads * G,), or one number if it is the same for all.
    """

    block: Tensor
    group: Tensor
    slot: Tensor
    owner: Tensor
    lengths: Tensor | int

    def reduce(self, x: Tensor, kind: str) -> Tensor:
        """Return the sum or the maximum ("sum", "max") of (pairs, ...) over the pairs of each group."""
        if isinstance(self.lengths, int):
            x = x.unflatten(0, (-1, self.lengths))
            return x.sum(1) if kind == "sum" else x.amax(1)
        # Unlike index_add, this adds in the same order each time, on a GPU too
        return torch.segment_reduce(x, kind, lengths=self.lengths, axis=0, unsafe=True)


def tile_pairs(chosen: Tensor, pack: int, count: int | None, device: torch.device) -> Tiles:
    """Return the tiles of `block_attention` for a mask (B, heads, G, M), with `count` blocks in each row if given."""
    B, heads, groups, blocks = chosen.shape
    number = B * heads * blocks
    if count is None and not chosen.is_meta:
        lengths = chosen.sum(-1).flatten().to(device)
        owner, block = chosen.reshape(-1, blocks).nonzero().to(device).unbind(1)
    else:
        lengths = blocks if count is None else count
        block = chosen.to(device, torch.uint8).topk(lengths, dim=-1).indices.flatten()
        owner = torch.arange(len(block), device=device) // lengths
    block = block + owner // groups * blocks
    # Number the groups of each block, and give each block as many tiles as its groups fill
    by_block, order = block.sort(stable=True)
    per_block = torch.zeros(number, dtype=torch.long, device=device).scatter_add(0, block, torch.ones_like(block))
    tiles = (per_block + pack - 1) // pack
    ends = tiles.cumsum(0)
    rank = torch.arange(len(block), device=device) - (per_block.cumsum(0) - per_block)[by_block]
    slot = torch.empty_like(order).scatter(0, order, ((ends - tiles)[by_block] + rank // pack) * pack + rank % pack)
    # At most one tile of each block is not full
    total = min(len(block), len(block) // pack + number)
    tile_block = torch.searchsorted(ends, torch.arange(total, device=device), right=True).clamp(max=number - 1)
    group = torch.zeros(total * pack, dtype=torch.long, device=device).scatter(0, slot, owner)
    return Tiles(tile_block, group.view(total, pack), slot, owner, lengths)
