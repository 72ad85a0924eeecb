"""Aggregated attention, the op of TransNeXt's first three stages (Shi, CVPR 2024, arXiv:2311.17132).

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
    """Each token attends by cosines to its neighbours, to a pooled map and to learned tokens.

    It is pixel-focused attention with three changes. Scores are cosines times a learned temperature and the logarithm
    of the number of keys, which keeps the attention equally sharp on larger maps. A learned query is added to all
    queries. The products of the queries with learned tokens are added to the weights of the neighbours. Padding and
    cost are those of `pixel_focused`.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stage sets the default of `pool`; the stride sets the size of the pretraining images' maps.
        pool: Side of the map divided by the side of the pooled map, which is rounded down and at least 1; by default 8,
            4 and 2 in the first three stages, as in the paper, and 2 in the last.
        window: Side of the neighbourhood in tokens, odd; default 3.
        pretrain_size: Side in pixels of the pretraining images; the offsets from which biases are computed are relative
            to the side of their maps. Default 224.
        bias_size: Side in pixels of the images for whose maps biases are computed, and then interpolated for maps of
            another size; by default biases are computed for each map itself.
    """

    family = "mixed"

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
        head_dim = dim // num_heads
        self.temperature = nn.Parameter(initial_temperature(num_heads))
        self.query_embedding = nn.Parameter(trunc_normal_(torch.empty(num_heads, 1, head_dim), std=0.02))
        self.learnable_tokens = nn.Parameter(trunc_normal_(torch.empty(num_heads, head_dim, window**2), std=0.02))
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
