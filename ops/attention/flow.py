"""Flow attention of Flowformer (Wu et al., ICML 2022, arXiv:2202.06258).

Written after the paper and the authors' repository, thuml/Flowformer (MIT).
"""

from typing import Any

import torch
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.precision import at_least_float32, without_autocast
from ops.registry import FIRST, Place, register_op

# Added to every term of a flow, as in the authors' nets for images
EPS = 1e-6


@register_op("flow")
class FlowAttention(nn.Module):
    """Linear attention as a flow network: keys compete for a fixed total flow, and queries are gated by their inflow.

    Queries and keys are sigmoids, and a flow is a sum of their products. Extra tokens take part as tokens of the map
    do. Cost is linear in H * W. Flows are computed in at least float32.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        qkv_bias: Give the query, key and value projections a bias; default True.
    """

    family = "linear"
    takes_extra = True

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        size, E = x.shape[1:3], 0 if extra is None else extra.shape[1]
        tokens = x.flatten(1, 2) if extra is None else torch.cat([extra, x.flatten(1, 2)], dim=1)
        qkv = self.qkv(tokens)
        with without_autocast(x):
            q, k, v = (split_heads(t, self.num_heads) for t in at_least_float32(*qkv.chunk(3, dim=-1)))
            out = merge_heads(flow_attention(q.sigmoid(), k.sigmoid(), v)).to(qkv.dtype)
        out = self.proj(out)
        x = out[:, E:].unflatten(1, size)
        return x if extra is None else (x, out[:, :E])


def flow_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute flow attention of positive queries and keys, all (B, heads, N, D)."""
    inflow, outflow = 1 / flow(q, k), 1 / flow(k, q)
    # Inflow if every key sends a total of 1, and outflow if every query receives a total of 1
    conserved_inflow, conserved_outflow = flow(q, k * outflow), flow(k, q * inflow)
    competition = conserved_outflow.clamp(-1, 1).softmax(-2) * k.shape[-2]
    gathered = k.transpose(-1, -2) @ (v * competition)
    return q @ gathered * inflow * conserved_inflow.sigmoid()


def flow(a: Tensor, b: Tensor) -> Tensor:
    """Return the flow between each token of `a` and all tokens of `b`, (B, heads, N, D) both: (B, heads, N, 1)."""
    return (a + EPS) @ (b.sum(-2, keepdim=True) + EPS).transpose(-1, -2) + EPS
