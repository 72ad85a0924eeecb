"""Trainable dynamic mask attention (Shi et al., 2025, arXiv:2508.02124).

Paper: Trainable Dynamic Mask Sparse Attention. Written after the repository of its authors, SmallDoges/flash-dmattn
(BSD-3-Clause), whose causal mask and rotary positions are left out, since a map has no order.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.attention.grouped_query import GroupedQueryAttention
from ops.registry import FIRST, Place, register_op
from ops.weighting import Values
from retinue.utils.arithmetic import padding

MASKS = ("topk", "relu")


@register_op("dynamic_mask")
class DynamicMaskAttention(GroupedQueryAttention):
    """All tokens attend to the few keys with the highest content score, which is also added to the attention's scores.

    The content score of a key is a learned factor times softplus of a linear function of the values, one for each key
    head. All queries of a head share its kept keys. The choice has no gradient. Queries and keys are normalised by
    their root mean square. Cost is linear in H * W if the number of kept keys is bounded, that is with "topk" and
    blocks of 1; with other masks all pairs of tokens are computed and those without a kept key are masked.

    Args:
        dim: Number of channels.
        num_heads: Number of query heads.
        kv_heads: Number of key and value heads, a divisor of `num_heads`; default as in op `grouped_query`.
        keys: Number of keys that a head keeps with "topk"; default 64. A map with fewer tokens keeps all of them.
        mask: "topk" (default) keeps the keys with the highest scores, the first ones of equal keys. "relu" keeps those
            with a positive score.
        block: Number of consecutive keys that are kept together if more than half of them are to be kept, else dropped
            together; default 1. A head that keeps no key returns zeros.
        bias: Give the linear layers a bias; default False.
    """

    family = "sparse"
    # A bias of low rank would have to follow the choice of the keys
    softmax_options = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        kv_heads: int | None = None,
        keys: int = 64,
        mask: str = "topk",
        block: int = 1,
        bias: bool = False,
    ):
        super().__init__(dim, num_heads, kv_heads=kv_heads, qkv_bias=bias, proj_bias=bias, qk_norm=True)
        if mask not in MASKS:
            raise ValueError(f"mask must be 'topk' or 'relu', not {mask!r}")
        if min(keys, block) < 1:
            raise ValueError(f"keys and block must be at least 1, not {keys} and {block}")
        self.keys, self.mask, self.block = keys, mask, block
        # The authors' factor starts at 0. Then all scores are equal, and `dt_proj` gets no gradient.
        self.A = nn.Parameter(torch.ones(self.kv_heads))
        self.dt_proj = nn.Linear(self.v.out_features, self.kv_heads, bias=bias)
        self.values = Values(by_head=True)

    def attend_heads(self, q: Tensor, k: Tensor, v: Tensor, size: Sequence[int]) -> Tensor:
        scores = self.A[:, None] * F.softplus(self.dt_proj(v.transpose(1, 2).flatten(2))).transpose(1, 2)
        scores, v = scores.to(q.dtype), self.values(v)  # (B, kv_heads, N), (B, kv_heads, N, D)
        order = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., : self.keys]
        if self.mask == "topk" and self.block == 1:
            scores = scores.gather(-1, order)
            k, v = (t.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, t.shape[-1])) for t in (k, v))
            kept = None
        else:
            kept = (
                scores > 0 if self.mask == "relu" else torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, 1)
            )
            kept = vote(kept, self.block)
            # Heads without a kept key attend to all keys here, so that softmax is defined, and are zeros below
            scores = scores.masked_fill(~kept & kept.any(-1, keepdim=True), -torch.inf)
        groups = self.allocate(k)
        out = F.scaled_dot_product_attention(q, k[:, groups], v[:, groups], attn_mask=scores[:, groups].unsqueeze(2))
        return out if kept is None else out * kept.any(-1)[:, groups, None, None]


def vote(kept: Tensor, block: int) -> Tensor:
    """Return for each key of (..., N) whether more than half of the keys in its block are True; the last is shorter."""
    N = kept.shape[-1]
    fill = padding(N, block)
    blocks = F.pad(kept, (0, fill)).unflatten(-1, (-1, block))
    sizes = F.pad(torch.ones_like(kept), (0, fill)).unflatten(-1, (-1, block)).sum(-1)
    majority = 2 * blocks.sum(-1) > sizes
    return majority.repeat_interleave(block, dim=-1)[..., :N]
