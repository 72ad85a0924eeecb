"""Length-scaled cosine attention, the op of TransNeXt's last stage (Shi, CVPR 2024, arXiv:2311.17132).

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
    """All tokens attend to all tokens, by cosines scaled with the logarithm of the number of tokens.

    Cosines are also multiplied by a learned temperature. The logarithm keeps the attention equally sharp on larger
    maps. A learned query is added to all queries. The bias of each pair of tokens is computed from their log-spaced
    offset, so it exists for any size of the map. Cost is quadratic in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stride sets the size of the pretraining images' maps.
        pretrain_size: Side in pixels of the pretraining images; the offsets from which biases are computed are relative
            to the side of their maps. Default 224.
        bias_size: Side in pixels of the images for whose maps biases are computed, and then interpolated for maps of
            another size; by default biases are computed for each map itself.
    """

    family = "full"
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
        """Return the module that computes the offsets for all blocks of a stage."""
        return MapOffsets(place.stride, 1, pretrain_size, bias_size)

    def no_weight_decay(self) -> set[str]:
        return {"cpb.fc1.weight", "cpb.fc2.weight", "temperature", "query_embedding"}

    def forward(self, x: Tensor, context: Offsets | None = None) -> Tensor:
        return self.proj(merge_heads(self.attend(x, context)).view(x.shape))

    def attend(self, x: Tensor, context: Offsets | None = None) -> Tensor:
        """Return the heads' outputs before the projection, (B, heads, H * W, D)."""
        H, W = x.shape[1:3]
        q, k, v = split_heads(self.qkv(x).flatten(1, 2), 3 * self.num_heads).chunk(3, dim=1)  # (B, heads, N, D)
        q = scaled_queries(F.normalize(q, dim=-1), self.query_embedding, self.temperature, math.log(H * W))
        bias = self.cpb(self.offsets(x) if context is None else context, (H, W), (H, W)).to(q.dtype)
        return F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, attn_mask=bias.unsqueeze(0), scale=1.0)


def scaled_queries(q: Tensor, embedding: Tensor, temperature: Tensor, log_length: Tensor | float) -> Tensor:
    """Add the learned query and multiply by the temperature and the logarithm of the number of keys.

    Args:
        q: Queries (B, heads, N, D) of length 1.
        embedding: Learned query (heads, 1, D).
        temperature: Temperature (heads, 1, 1) before softplus.
        log_length: Logarithm of the number of keys, for all queries or for each: (N, 1).
    """
    scale = F.softplus(temperature) * log_length
    return (q + embedding) * scale.to(q.dtype)


def initial_temperature(num_heads: int) -> Tensor:
    """Return temperatures (heads, 1, 1) that softplus turns into 1 / 0.24, the author's initial value."""
    return torch.full((num_heads, 1, 1), math.log(math.expm1(1 / 0.24)))
