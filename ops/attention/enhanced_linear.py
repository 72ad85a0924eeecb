"""Enhanced linear attention of L2ViT (Zheng, 2025, arXiv:2501.16182).

Written after the paper and the author's repository, ChuanyangZheng/L2ViT (MIT).
"""

import torch
from torch import Tensor, nn

from ops.linear import linear_attention
from ops.registry import FIRST, Place, register_op

# Smallest value by which a query's weights are divided; smaller values make training unstable
MIN_SUM = 100.0


@register_op("enhanced_linear")
class EnhancedLinearAttention(nn.Module):
    """All tokens attend to all tokens, with products of rectified queries and keys as weights instead of a softmax.

    A query's weights are divided by their sum, or by 100 if the sum is smaller, so on small maps the weights sum to
    less than 1. A learned factor for each head scales the result. The paper's local enhancement, a module of depthwise
    convolutions, is part of the net's blocks, not of this op. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        qkv_bias: Give the query, key and value projections a bias; default True.
    """

    family = "linear"

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), (dim // num_heads) ** -0.5))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens, scale = self.qkv(x).flatten(1, 2), self.temperature.flatten()
        out = linear_attention(tokens, self.num_heads, "relu", "sum", scale, MIN_SUM)
        return self.proj(out.unflatten(1, x.shape[1:3]))
