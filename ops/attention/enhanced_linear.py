"""Linear attention of L2ViT (Zheng, 2025, arXiv:2501.16182)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op

SMALLEST_SUM = 100.0  # that scores are divided by: less makes training unstable


@register_op("enhanced_linear")
class EnhancedLinearAttention(nn.Module):
    """Attention among all tokens with the products of rectified queries and keys as weights, not exponentials.

    Their sum is not taken below 100, so on small maps the weights sum up to less than one. A learned factor for each
    head scales the result. Cost is linear in H * W. What else enhances it, a module of depthwise convolutions that
    concentrates what comes from far, is part of the net's blocks.

    Args:
        dim, num_heads: channels and heads.
        qkv_bias: give the query, key and value projections a bias.
    """

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), (dim // num_heads) ** -0.5))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).flatten(1, 2).chunk(3, dim=-1))
        q, k = F.relu(q), F.relu(k)
        total = (q @ k.sum(-2).unsqueeze(-1)).clamp(min=SMALLEST_SUM)  # (B, heads, N, 1)
        out = q @ (k.transpose(-2, -1) @ v * self.temperature) / total
        return self.proj(merge_heads(out).unflatten(1, x.shape[1:3]))
