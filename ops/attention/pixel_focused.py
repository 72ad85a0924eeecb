"""Pixel-focused attention of TransNeXt (Shi, CVPR 2024, arXiv:2311.17132, section 3.1), the first form of its op.

Written after the paper and the author's repository, DaiShiResearch/TransNeXt (Apache-2.0), without its CUDA kernels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ops.continuous_bias import ContinuousBias, MapOffsets, Offsets
from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op


class Positions(NamedTuple):
    """What the attention on a map takes from its size."""

    keys: tuple[int, int]  # size of the pooled map
    offsets: Offsets
    log_length: Tensor  # of the number of tokens and pooled tokens that each token attends to: (H * W, 1)
    inside: Tensor  # whether each neighbour of each token is on the map: (H * W, window²)


class MapPositions(MapOffsets):
    """`Positions` of a map (B, H, W, C)."""

    def __init__(self, stride: int, pool: int, pretrain_size: int, bias_size: int | None, window: int):
        super().__init__(stride, pool, pretrain_size, bias_size)
        self.window = window

    def forward(self, x: Tensor) -> Positions:
        H, W = x.shape[1:3]
        keys = self.pooled_side(H), self.pooled_side(W)
        offsets = super().forward(x)
        inside = neighbours(offsets.table.new_ones(1, H, W, 1, 1), self.window).view(H * W, -1)
        log_length = (inside.sum(-1, keepdim=True) + keys[0] * keys[1]).log()
        return Positions(keys, offsets, log_length, inside > 0)


@register_op("pixel_focused")
class PixelFocusedAttention(nn.Module):
    """Each token attends to its neighbours and to all tokens of a pooled map, in one softmax. Cost and memory are those
    of H * W * (window² + H * W / pool²) pairs.

    Neighbours beyond the map are left out. Each neighbour's place has a learned bias; those of pooled tokens are made
    from log-spaced offsets, for any size of the map.

    Args:
        dim, num_heads: channels and heads.
        pool: how many times smaller than the map's the sides of the pooled map are, rounded down; by default the
            paper's 8, 4 and 2 in the first three stages, and 2 in the last.
        window: side of the neighbourhood; odd.
        pretrain_size: side of the images of pretraining, to whose maps offsets are relative.
        bias_size: side of the images for whose maps biases are made, to be interpolated for the others; by default
            they are made for each map itself.
    """

    renames = ((r"^cpb_fc(\d)\.", r"cpb.fc\1."),)

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
        super().__init__()
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window must be odd, not {window}")
        self.num_heads, self.window = num_heads, window
        self.positions = self.make_context(place, dim, num_heads, pool, window, pretrain_size, bias_size)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)
        self.cpb = ContinuousBias(num_heads)
        self.relative_pos_bias_local = nn.Parameter(trunc_normal_(torch.empty(num_heads, window**2), std=0.0004))

    @staticmethod
    def make_context(
        place: Place,
        dim: int,
        num_heads: int,
        pool: int | None = None,
        window: int = 3,
        pretrain_size: int = 224,
        bias_size: int | None = None,
    ) -> MapPositions:
        pool = max(8 >> place.stage, 2) if pool is None else pool
        return MapPositions(place.stride, pool, pretrain_size, bias_size, window)

    def no_weight_decay(self) -> set[str]:
        return {"relative_pos_bias_local", "cpb.fc1.weight", "cpb.fc2.weight"}

    def forward(self, x: Tensor, context: Positions | None = None) -> Tensor:
        positions = self.positions(x) if context is None else context
        pooled = F.adaptive_avg_pool2d(F.gelu(self.sr(x.permute(0, 3, 1, 2))), positions.keys)
        pooled = self.norm(pooled.flatten(2).transpose(1, 2))
        q = split_heads(self.q(x).flatten(1, 2), self.num_heads)  # (B, heads, N, D)
        k, v = self.kv(x).unflatten(-1, (2 * self.num_heads, -1)).chunk(2, dim=3)  # (B, H, W, heads, D)
        pooled_k, pooled_v = split_heads(self.kv(pooled), 2 * self.num_heads).chunk(2, dim=1)
        q, k, pooled_k, learned = self.prepare(q, k, pooled_k, positions.log_length)

        near = (neighbours(k, self.window) @ q.unsqueeze(-1)).squeeze(-1) + self.relative_pos_bias_local.unsqueeze(1)
        near = near.masked_fill(~positions.inside, -torch.inf)  # (B, heads, N, window²)
        bias = self.cpb(positions.offsets, x.shape[1:3], positions.keys)
        far = q @ pooled_k.transpose(-2, -1) + bias.to(q.dtype)  # (B, heads, N, h * w)
        weights = torch.cat([near, far], dim=-1).softmax(-1)
        near, far = weights.split([near.shape[-1], far.shape[-1]], dim=-1)
        if learned is not None:
            near = near + learned
        out = (near.unsqueeze(-2) @ neighbours(v, self.window)).squeeze(-2) + far @ pooled_v
        return self.proj(merge_heads(out).view(x.shape))

    def prepare(
        self, q: Tensor, k: Tensor, pooled_k: Tensor, log_length: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries and keys whose products are the scores, and what is added to the weights of the neighbours."""
        return q * q.shape[-1] ** -0.5, k, pooled_k, None


def neighbours(x: Tensor, window: int) -> Tensor:
    """The neighbours of each token of (B, H, W, heads, D), zeros beyond the map: (B, heads, H * W, window², D)."""
    pad = window // 2
    x = F.pad(x, (0, 0, 0, 0, pad, pad, pad, pad)).unfold(1, window, 1).unfold(2, window, 1)
    return x.permute(0, 3, 1, 2, 5, 6, 4).flatten(4, 5).flatten(2, 3)
