"""Aggregated attention of TransNeXt (Shi, CVPR 2024, arXiv:2311.17132).

Written after the paper and the author's repository, DaiShiResearch/TransNeXt (Apache-2.0), without its CUDA kernels.
"""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ops.attention.length_scaled_cosine import initial_temperature, scaled_queries
from ops.attention.pixel_focused import PixelFocusedAttention
from ops.registry import FIRST, Place, register_op


@register_op("aggregated")
class AggregatedAttention(PixelFocusedAttention):
    """Pixel-focused attention by length-scaled cosines, with a learned query added to all queries and with learned
    tokens, whose products with the queries are added to the weights of the neighbours. Cost as of `pixel_focused`.

    Args:
        dim, num_heads, pool, window, pretrain_size, bias_size: as of `pixel_focused`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        pool: int | None = None,
        window: int = 3,
        pretrain_size: int = 224,
        bias_size: int | None = None,
    ):
        super().__init__(
            dim, num_heads, place=place, pool=pool, window=window, pretrain_size=pretrain_size, bias_size=bias_size
        )
        width = dim // num_heads
        self.temperature = nn.Parameter(initial_temperature(num_heads))
        self.query_embedding = nn.Parameter(trunc_normal_(torch.empty(num_heads, 1, width), std=0.02))
        self.learnable_tokens = nn.Parameter(trunc_normal_(torch.empty(num_heads, width, window**2), std=0.02))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, window**2))

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"temperature", "query_embedding"}

    def prepare(
        self, q: Tensor, k: Tensor, pooled_k: Tensor, log_length: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q = F.normalize(q, dim=-1)
        learned = q @ self.learnable_tokens + self.learnable_bias
        q = scaled_queries(q, self.query_embedding, self.temperature, log_length)
        return q, F.normalize(k, dim=-1), F.normalize(pooled_k, dim=-1), learned
