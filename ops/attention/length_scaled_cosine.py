"""Length-scaled cosine attention of TransNeXt's last stage (Shi, CVPR 2024, arXiv:2311.17132).

Written after the paper and the author's repository, DaiShiResearch/TransNeXt (Apache-2.0).
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ops.continuous_bias import ContinuousBias, MapOffsets, Offsets
from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op


@register_op("length_scaled_cosine")
class LengthScaledCosineAttention(nn.Module):
    """Full self-attention whose scores are cosines times a learned temperature and the logarithm of the number of
    tokens, which keeps it as sharp on a larger map. A learned query is added to all queries, and a bias is made of
    log-spaced offsets for any size of the map. Cost is quadratic in H * W.

    Args:
        dim, num_heads: channels and heads.
        pretrain_size, bias_size: as of `aggregated`.
    """

    renames = ((r"^cpb_fc(\d)\.", r"cpb.fc\1."),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        pretrain_size: int = 224,
        bias_size: int | None = None,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.offsets = self.make_context(place, dim, num_heads, pretrain_size, bias_size)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.cpb = ContinuousBias(num_heads)
        self.temperature = nn.Parameter(initial_temperature(num_heads))
        self.query_embedding = nn.Parameter(trunc_normal_(torch.empty(num_heads, 1, dim // num_heads), std=0.02))

    @staticmethod
    def make_context(
        place: Place, dim: int, num_heads: int, pretrain_size: int = 224, bias_size: int | None = None
    ) -> MapOffsets:
        return MapOffsets(place.stride, 1, pretrain_size, bias_size)

    def no_weight_decay(self) -> set[str]:
        return {"cpb.fc1.weight", "cpb.fc2.weight", "temperature", "query_embedding"}

    def forward(self, x: Tensor, context: Offsets | None = None) -> Tensor:
        H, W = x.shape[1:3]
        q, k, v = split_heads(self.qkv(x).flatten(1, 2), 3 * self.num_heads).chunk(3, dim=1)  # (B, heads, N, D)
        q = scaled_queries(F.normalize(q, dim=-1), self.query_embedding, self.temperature, math.log(H * W))
        bias = self.cpb(self.offsets(x) if context is None else context, (H, W), (H, W)).to(q.dtype)
        out = F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, attn_mask=bias.unsqueeze(0), scale=1.0)
        return self.proj(merge_heads(out).view(x.shape))


def scaled_queries(q: Tensor, embedding: Tensor, temperature: Tensor, log_length: Tensor | float) -> Tensor:
    """Queries (B, heads, N, D) of length 1, with the learned one added, as sharp as the number of keys asks for."""
    scale = F.softplus(temperature) * log_length
    return (q + embedding) * scale.to(q.dtype)


def initial_temperature(num_heads: int) -> Tensor:
    """(heads, 1, 1), of which softplus makes the author's 1 / 0.24."""
    return torch.full((num_heads, 1, 1), math.log(math.expm1(1 / 0.24)))
