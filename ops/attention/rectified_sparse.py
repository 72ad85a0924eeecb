"""Rectified sparse attention: chosen blocks, corrected by pooled attention to the others.

Paper: Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation (Liu et al., 2025,
arXiv:2511.19835). Written after the description of the authors' repository, BienLuky/Rectified-SpaAttn. The paper
orders the tokens of a video along a space-filling curve, so that blocks are compact; here blocks are tiles of the map.
The paper applies the op to trained nets only.
"""

from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from ops.blocks import Blocks, block_attention, extra_attention, fit_block
from ops.functional import split_heads
from ops.rectification import PooledAttention, pooled_attention, rectify
from ops.registry import FIRST, Place, register_op


@register_op("rectified_sparse")
class RectifiedSparseAttention(nn.Module):
    """Each tile attends to the tiles that pooled attention weights most, and to the mean values of tiles left out.

    Pooled attention is the softmax of the products of mean queries and mean keys. A tile attends to the tokens of its
    `topk` first tiles, or of more until their weights exceed the share `share`. Tiles that are left out are replaced by
    their mean values where the scores inside the pair of tiles differ little (`ops/rectification.py`); otherwise their
    weight goes to the kept tiles. Extra tokens are not pooled, are attended to by all tokens and attend to all tokens.
    Padded tokens are neither attended to nor counted. Cost is H * W times the tokens of the kept tiles, and quadratic
    in the number of tiles.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        tile: Side of a tile in tokens, or its sides along H and W; default 7.
        topk: Minimum number of tiles that a tile attends to; default 4.
        share: Share of the pooled attention up to which further tiles are kept; default 0.3.
        neighbors: Also keep the adjacent tiles, the diagonal ones included; default False.
        count_padding: Count padded tokens as zeros in all means, as the authors' code does; default False.
    """

    family = "sparse"
    takes_extra = True
    # The number of kept tiles depends on the data
    fullgraph = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        tile: int | tuple[int, int] = 7,
        topk: int = 4,
        share: float = 0.3,
        neighbors: bool = False,
        count_padding: bool = False,
    ):
        super().__init__()
        # Any, because the annotation of to_2tuple does not say that it returns a pair
        sides: Any = to_2tuple(tile)
        if min(*sides, topk) < 1:
            raise ValueError(f"tile and topk must be at least 1, not {tile} and {topk}")
        if not 0 <= share <= 1:
            raise ValueError(f"share must be from 0 to 1, not {share}")
        self.num_heads, self.tile, self.topk, self.share = num_heads, sides, topk, share
        self.neighbors, self.count_padding = neighbors, count_padding
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        cut = fit_block(self.tile, (x.shape[1], x.shape[2]))
        qkv = self.qkv(x)
        q, k, v = (cut.split(t, self.num_heads) for t in qkv.chunk(3, dim=-1))
        real = cut.real(x.device) if cut.padded else None
        extra_qkv = None if extra is None else self.qkv(extra)
        extra_kv = None
        if extra_qkv is not None:
            extra_k, extra_v = (split_heads(t, self.num_heads) for t in extra_qkv.chunk(3, dim=-1)[1:])
            extra_kv = (extra_k, extra_v)

        # With zeros in the means, the blocks are those of the padded map
        counted = cut.whole() if self.count_padding else cut
        pooled = pooled_attention(q, k, counted, None if extra_kv is None else extra_kv[0])
        kept = self.keep(pooled, cut)
        # On the meta device the minimum number of tiles is counted
        count = min(self.topk, cut.number) if x.is_meta else None
        out = block_attention(q, k, v, kept, real, count, extra=extra_kv)
        out = self.proj(cut.join(rectify(out, pooled, kept, counted.means(v))))
        if extra_qkv is None:
            return out
        return out, self.proj(extra_attention(extra_qkv, qkv, self.num_heads))

    def keep(self, pooled: PooledAttention, cut: Blocks) -> Tensor:
        """Return the mask (B, heads, M, M) of the tiles that each tile attends to."""
        # All extra tokens together are one more entry, which is kept anyway
        weights = torch.cat([pooled.weights, pooled.extra_mass], dim=-1).detach()
        largest, order = weights.sort(-1, descending=True)
        number = (1 + (largest.cumsum(-1) <= self.share).sum(-1, keepdim=True)).clamp(min=self.topk)
        rank = torch.arange(weights.shape[-1], device=weights.device)
        kept = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, order, rank < number)[..., :-1]
        return kept | (cut.distances(weights.device) <= 1) if self.neighbors else kept
