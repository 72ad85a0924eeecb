"""Selective self-attention (Zhang et al., NeurIPS 2024, arXiv:2411.12892).

Paper: Selective Attention: Enhancing Transformer through Principled Context Control. Written after the abstract and a
description of its formulas, without the authors' code. Ours is what the temperatures of a token read: the query, key or
value itself.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op
from ops.weighting import Values
from ops.windowed import WindowedOp


@register_op("selective")
class SelectiveAttention(WindowedOp):
    """Attention in which each query has an inverse temperature of its own and each value a scale of its own.

    Both are tanh(w · t) + 1 + sigmoid(α) * log(N) with the query or value t, the number of tokens N, and w and α
    learned for each head. The logarithm keeps the attention equally sharp with more tokens. Windows and padding are
    those of `WindowedOp`; cost is linear in H * W with windows, else quadratic.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stride sets the default of `window`.
        window: Side of the windows, as in `WindowedOp`.
        scale_keys: Scale the keys as well; default False.
        qkv_bias: Give the query, key and value projections a bias; default True.
    """

    family = "local"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int | None = None,
        scale_keys: bool = False,
        qkv_bias: bool = True,
    ):
        super().__init__(place, window)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_scale = TokenScale(num_heads, dim // num_heads)
        self.k_scale = TokenScale(num_heads, dim // num_heads) if scale_keys else nn.Identity()
        self.v_scale = TokenScale(num_heads, dim // num_heads)
        self.values = Values(by_head=True)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(self.q_scale(q), self.k_scale(k), self.values(self.v_scale(v)))
        return self.proj(merge_heads(out))


class TokenScale(nn.Module):
    """Multiplication of each token (B, heads, N, D) by a learned function of itself and of the number of tokens.

    Args:
        num_heads: Number of heads.
        head_dim: Channels D of a head.
    """

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(trunc_normal_(torch.empty(num_heads, head_dim, 1), std=0.02))
        self.alpha = nn.Parameter(torch.zeros(num_heads, 1, 1))

    def no_weight_decay(self) -> set[str]:
        return {"weight", "alpha"}

    def forward(self, x: Tensor) -> Tensor:
        position = 1 + self.alpha.sigmoid() * math.log(x.shape[-2])
        return x * ((x @ self.weight).tanh() + position).to(x.dtype)
