"""Blocks of a map, and attention of tokens to the blocks that are chosen for them.

A block is a rectangle of tokens: a tile, a strip of rows or columns, or a run of consecutive tokens if the map is first
viewed as one row.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.functional import merge_heads, split_heads
from ops.windows import from_windows, pad_to_multiple, to_windows
from retinue.utils.arithmetic import ceil_div

Pair = tuple[int, int]

# Largest map, in tokens, for which block attention masks dense attention instead of gathering the chosen blocks
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
    """Return the mask of the `count` blocks with the largest scores (..., M) of each row, or of all if M is less."""
    index = scores.topk(min(count, scores.shape[-1]), dim=-1).indices
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
    `MAX_MASKED_TOKENS` tokens, where masked dense attention is faster.

    Args:
        q: Queries (B, heads, G, Q, D): G groups of Q queries, such as blocks, or single tokens with Q = 1.
        k: Keys (B, heads, M, L, D) of M blocks.
        v: Values (B, heads, M, L, D).
        chosen: True where a group attends to a block; broadcasts to (B, heads, G, M). Each group attends to a block. A
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
    chosen = chosen.expand(B, heads, groups, blocks)
    if not q.is_meta and max(groups * queries, blocks * length) <= MAX_MASKED_TOKENS:
        mask = chosen.to(q.device)[..., None, :, None].expand(-1, -1, -1, queries, -1, length)
        mask = mask.flatten(4).flatten(2, 3)  # (B, heads, G * Q, M * L)
        if real is not None:
            mask = mask & real.flatten()
        if causal:
            mask = mask & torch.ones(mask.shape[-2:], dtype=torch.bool, device=q.device).tril()
        k, v = k.flatten(2, 3), v.flatten(2, 3)
        if extra is not None:
            k, v = torch.cat([extra[0], k], dim=2), torch.cat([extra[1], v], dim=2)
            mask = F.pad(mask, (extra[0].shape[2], 0), value=True)
        return F.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=mask).view(q.shape)

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
    top = torch.full((len(q), queries, 1), -torch.inf, dtype=dtype, device=q.device)
    if extra is not None:
        extra_scores = (q.view(B * heads, -1, D) @ extra[0].flatten(0, 1).transpose(1, 2)).to(dtype)
        extra_scores = extra_scores.view(len(q), queries, -1)
        top = extra_scores.detach().amax(-1, keepdim=True)
    top = top.scatter_reduce(0, tiles.owner.view(-1, 1, 1).expand_as(peak), peak, "amax")
    factor = (peak - top.index_select(0, tiles.owner)).exp()
    total, values = (t.new_zeros(len(q), *t.shape[1:]).index_add(0, tiles.owner, factor * t) for t in (total, values))
    if extra is not None:
        weights = (extra_scores - top).exp()
        extra_v = extra[1].flatten(0, 1)
        extra_values = (weights.to(extra_v.dtype).view(B * heads, -1, weights.shape[-1]) @ extra_v).to(dtype)
        total, values = total + weights.sum(-1, keepdim=True), values + extra_values.view_as(values)
    return (values / total).to(v.dtype).view(B, heads, groups, queries, D)


def extra_attention(extra_qkv: Tensor, qkv: Tensor, num_heads: int) -> Tensor:
    """Compute attention of extra tokens to themselves and to all tokens of a map.

    Args:
        extra_qkv: Queries, keys and values (B, E, 3C) of the extra tokens.
        qkv: Queries, keys and values (B, H, W, 3C) of the map, of which the queries are not used.
        num_heads: Number of heads.

    Returns:
        Tensor (B, E, C).
    """
    q, extra_k, extra_v = (split_heads(t, num_heads) for t in extra_qkv.chunk(3, dim=-1))
    k, v = (split_heads(t.flatten(1, 2), num_heads) for t in qkv.chunk(3, dim=-1)[1:])
    return merge_heads(
        F.scaled_dot_product_attention(q, torch.cat([extra_k, k], dim=2), torch.cat([extra_v, v], dim=2))
    )


class Tiles(NamedTuple):
    """Pairs of group and block, sorted into tiles of one block and up to `pack` groups that attend to it.

    Attributes:
        block: Block of each tile among those of all images and heads: (tiles,).
        group: Groups of each tile among those of all images and heads, 0 in unused slots: (tiles, pack).
        slot: Index of each pair in the flattened `group`: (pairs,).
        owner: Group of each pair: (pairs,).
    """

    block: Tensor
    group: Tensor
    slot: Tensor
    owner: Tensor


def tile_pairs(chosen: Tensor, pack: int, count: int | None, device: torch.device) -> Tiles:
    """Return the tiles of `block_attention` for a mask (B, heads, G, M), with `count` blocks in each row if given."""
    B, heads, groups, blocks = chosen.shape
    number = B * heads * blocks
    if count is None and not chosen.is_meta:
        block, owner = chosen.transpose(2, 3).reshape(number, groups).nonzero().to(device).unbind(1)
        owner = owner + block // blocks * groups
    else:
        count = blocks if count is None else count
        index = chosen.to(device, torch.uint8).topk(count, dim=-1).indices.flatten(0, 1)  # (B * heads, G, count)
        block = (index + blocks * torch.arange(B * heads, device=device).view(-1, 1, 1)).flatten()
        block, order = block.sort(stable=True)
        owner = order // count
    per_block = torch.zeros(number, dtype=torch.long, device=device).scatter_add(0, block, torch.ones_like(block))
    tiles = (per_block + pack - 1) // pack
    ends = tiles.cumsum(0)
    rank = torch.arange(len(block), device=device) - (per_block.cumsum(0) - per_block)[block]
    slot = ((ends - tiles)[block] + rank // pack) * pack + rank % pack
    # At most one tile of each block is not full
    total = min(len(block), len(block) // pack + number)
    tile_block = torch.searchsorted(ends, torch.arange(total, device=device), right=True).clamp(max=number - 1)
    group = torch.zeros(total * pack, dtype=torch.long, device=device).scatter(0, slot, owner)
    return Tiles(tile_block, group.view(total, pack), slot, owner)
