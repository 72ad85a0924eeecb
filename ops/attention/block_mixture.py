"""Mixture-of-block attention of VMoBA.

Paper: VMoBA: Mixture-of-Block Attention for Video Diffusion Models (Wu et al., 2025, arXiv:2506.23858). Written after
the paper and the description of the authors' repository, KwaiVGI/VMoBA. The paper cuts videos into blocks of frames,
columns of tiles and cubes in turn; here a map is cut into strips of rows, strips of columns and tiles.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from ops.blocks import Blocks, block_attention, fit_block, top_blocks
from ops.precision import at_least_float32, without_autocast
from ops.rectification import pooled_attention, rectify
from ops.registry import FIRST, Place, register_op
from retinue.utils.arithmetic import ceil_div

ORDERS = ("rows", "columns", "tiles")
SELECTIONS = ("threshold", "topk")
SCOPES = ("query_head", "head_global", "overall", "block")


@register_op("block_mixture")
class BlockMixtureAttention(nn.Module):
    """Each token and head attends to the token's own block and to the blocks whose mean keys best match its query.

    The match is the scalar product, the gate. Blocks are chosen in one of two ways, in a scope: the blocks of a query
    and head ("query_head"), or all pairs of query and block of a head ("head_global"), or of all heads ("overall"), or
    all pairs of query and head of a block ("block"), each time of one image.

    - "topk": the largest gates of the scope, `topk` for each query and head on average, own blocks first. With a `topk`
      of 1 nothing but the own blocks would be chosen, and all blocks are attended to, as in the authors' code.
    - "threshold": gates are scaled to [0, 1] over the scope. The gates of own blocks count first, then the largest
      others are taken until the share `threshold` of the sum is reached, at least one.

    Padded tokens are neither attended to nor counted. Cost is that of the gates, H * W times the number of blocks, and
    of the chosen blocks.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The block sets the default of `order`.
        order: Kind of blocks, "rows", "columns" or "tiles"; by default these in turn over the blocks of the stage.
        tile: Side of a tile in tokens, or its sides along H and W; default 7.
        strip: Number of rows or columns of a strip; by default so many that a strip has about as many tokens as a tile.
        select: "threshold" (default) or "topk".
        topk: Number of blocks for each query and head, the own one included; default 3.
        threshold: Share of the sum of the scaled gates; default 0.25.
        scope: One of the scopes above; default "query_head". "block" is only for "threshold".
        rectify: Correct the output by the pooled attention to the blocks that were not chosen, as the op
            `rectified_sparse` does; default False.
    """

    family = "sparse"
    # The number of chosen blocks depends on the data, except with "topk" for each query and head
    fullgraph = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        order: str | None = None,
        tile: int | tuple[int, int] = 7,
        strip: int | None = None,
        select: str = "threshold",
        topk: int = 3,
        threshold: float = 0.25,
        scope: str = "query_head",
        rectify: bool = False,
    ):
        super().__init__()
        order = ORDERS[place.block % 3] if order is None else order
        for name, value, known in (("order", order, ORDERS), ("select", select, SELECTIONS), ("scope", scope, SCOPES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if select == "topk" and scope == "block":
            raise ValueError("scope 'block' is for select='threshold' only")
        # Any, because the annotation of to_2tuple does not say that it returns a pair
        sides: Any = to_2tuple(tile)
        if min(*sides, 1 if strip is None else strip) < 1:
            raise ValueError(f"tile and strip must be at least 1, not {tile} and {strip}")
        if select == "topk" and topk < 1:
            raise ValueError(f"topk must be at least 1, not {topk}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be a share from 0 to 1, not {threshold}")
        self.num_heads, self.order, self.tile, self.strip = num_heads, order, sides, strip
        self.select, self.topk, self.threshold, self.scope, self.rectify = select, topk, threshold, scope, rectify
        self.fullgraph = select == "topk" and scope == "query_head"
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        cut = self.cut(x.shape[1], x.shape[2])
        q, k, v = (cut.split(t, self.num_heads) for t in self.qkv(x).chunk(3, dim=-1))
        real = cut.real(x.device) if cut.padded else None
        chosen = self.choose(q.detach(), k.detach(), cut)
        tokens = q.flatten(2, 3).unsqueeze(3)  # (B, heads, N, 1, D)
        out = block_attention(tokens, k, v, chosen, real, self.count(cut.number, x.is_meta))
        if self.rectify:
            out = rectify(out, pooled_attention(q, k, cut), chosen, cut.means(v))
        return self.proj(cut.join(out.view(q.shape)))

    def cut(self, H: int, W: int) -> Blocks:
        """Return the blocks of a map of H x W tokens."""
        if self.order == "tiles":
            return fit_block(self.tile, (H, W))
        length = W if self.order == "rows" else H
        strip = max(1, round(self.tile[0] * self.tile[1] / length)) if self.strip is None else self.strip
        return fit_block((strip, W) if self.order == "rows" else (H, strip), (H, W))

    def count(self, blocks: int, estimate: bool) -> int | None:
        """Return the number of chosen blocks of each query if it is known, or on demand an estimate, else None."""
        if self.select == "topk" and (self.scope == "query_head" or self.topk == 1 or estimate):
            return blocks if self.topk == 1 else min(self.topk, blocks)
        # The largest gates reach a share of their sum with at most that share of the blocks
        return min(1 + ceil_div(round(1000 * self.threshold) * blocks, 1000), blocks) if estimate else None

    def choose(self, q: Tensor, k: Tensor, cut: Blocks) -> Tensor:
        """Return the mask (B, heads, N, M) of the blocks that each token attends to.

        Args:
            q: Queries (B, heads, M, L, D).
            k: Keys (B, heads, M, L, D).
            cut: The M blocks; N = M * L with the padded tokens.
        """
        with without_autocast(q):
            q, k = at_least_float32(q, k)
            gates = q.flatten(2, 3) @ cut.means(k).transpose(-2, -1)
        if self.select == "topk" and self.topk == 1:
            return torch.ones_like(gates, dtype=torch.bool)
        blocks = torch.arange(cut.number, device=gates.device)
        own = (blocks.repeat_interleave(q.shape[3])[:, None] == blocks).expand_as(gates)
        valid = cut.real(gates.device).flatten()[:, None].expand_as(gates)
        gates, own_entries, valid = (self.to_scope(t) for t in (gates, own, valid))
        if self.select == "topk":
            tokens = cut.size[0] * cut.size[1]
            rows = {"query_head": 1, "head_global": tokens, "overall": self.num_heads * tokens}[self.scope]
            scores = gates.masked_fill(~valid, -torch.inf).masked_fill(own_entries & valid, torch.inf)
            chosen = top_blocks(scores, min(self.topk, cut.number) * rows)
        else:
            chosen = top_share(gates, own_entries, valid, self.threshold)
        if self.scope == "block":
            chosen = chosen.view(q.shape[0], cut.number, self.num_heads, -1).movedim(1, -1)
        # Padded queries attend to their own block, and their outputs are cut off
        return chosen.reshape(own.shape) | own

    def to_scope(self, x: Tensor) -> Tensor:
        """Flatten the dimensions of (B, heads, N, M) over which blocks are chosen together."""
        if self.scope == "block":
            return x.movedim(-1, 1).flatten(2)
        return x.flatten({"query_head": 3, "head_global": 2, "overall": 1}[self.scope])


def top_share(gates: Tensor, own: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Return the mask of the largest entries that reach a share of their sum, beside those of own blocks.

    Args:
        gates: Gates (..., K).
        own: True for entries of a query's own block, which count first and are not among the chosen ones.
        valid: True for entries that take part.
        threshold: Share of the sum of the gates, after they are scaled to [0, 1].
    """
    low = gates.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    span = gates.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True) - low
    weights = ((gates - low) / torch.where(span <= 1e-6, 1, span)).masked_fill(~valid, 0)
    total = weights.sum(-1, keepdim=True) + 1e-6
    missing = (threshold - (weights * own).sum(-1, keepdim=True) / total).clamp(min=0)
    others = valid & ~own
    largest, order = weights.masked_fill(~others, -1).sort(-1, descending=True)
    reached = largest.clamp(min=0).cumsum(-1) / total >= missing
    # The entry that reaches the share is included
    taken = F.pad(~reached[..., :-1], (1, 0), value=True)
    return torch.zeros_like(own).scatter(-1, order, taken) & others
