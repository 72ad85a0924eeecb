"""Pixel-focused attention, on which TransNeXt's op is built (Shi, CVPR 2024, arXiv:2311.17132, section 3.1).

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
    """Tensors that pixel-focused attention needs for a map of size (H, W) and that depend on the size alone.

    Attributes:
        pooled_size: Size (h, w) of the pooled map.
        offsets: Offsets from the map's tokens to the pooled map's.
        log_length: Logarithm of each token's number of keys, neighbours on the map plus pooled tokens: (H * W, 1).
        on_map: True for each neighbour of each token that is on the map: (H * W, window²).
    """

    pooled_size: tuple[int, int]
    offsets: Offsets
    log_length: Tensor
    on_map: Tensor


class MapPositions(MapOffsets):
    """Compute the `Positions` of a map (B, H, W, C); all blocks of a stage share them.

    Args:
        stride: As in `MapOffsets`.
        pool: As in `MapOffsets`.
        pretrain_size: As in `MapOffsets`.
        bias_size: As in `MapOffsets`.
        window: Side of the neighbourhood in tokens, odd.
    """

    def __init__(self, stride: int, pool: int, pretrain_size: int, bias_size: int | None, window: int):
        super().__init__(stride, pool, pretrain_size, bias_size)
        self.window = window

    def forward(self, x: Tensor) -> Positions:
        H, W = x.shape[1:3]
        pooled_size = self.pooled_side(H), self.pooled_side(W)
        offsets = super().forward(x)
        on_map = neighbours(offsets.table.new_ones(1, H, W, 1, 1), self.window).view(H * W, -1)
        log_length = (on_map.sum(-1, keepdim=True) + pooled_size[0] * pooled_size[1]).log()
        return Positions(pooled_size, offsets, log_length, on_map > 0)


@register_op("pixel_focused")
class PixelFocusedAttention(nn.Module):
    """Each token attends to its neighbours and to all tokens of a pooled map, in one softmax.

    Neighbours beyond the edge of the map are left out. Neighbours have a learned bias for each relative position. The
    biases of pooled tokens are computed from log-spaced offsets, so they exist for any size of the map. Cost and memory
    are proportional to H * W * (window² + H * W / pool²).

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
        """Return the module that computes the positions for all blocks of a stage."""
        pool = max(8 >> place.stage, 2) if pool is None else pool
        return MapPositions(place.stride, pool, pretrain_size, bias_size, window)

    def no_weight_decay(self) -> set[str]:
        return {"relative_pos_bias_local", "cpb.fc1.weight", "cpb.fc2.weight"}

    def forward(self, x: Tensor, context: Positions | None = None) -> Tensor:
        return self.proj(merge_heads(self.attend(x, context)).view(x.shape))

    def attend(self, x: Tensor, context: Positions | None = None) -> Tensor:
        """Return the heads' outputs before the projection, (B, heads, H * W, D)."""
        positions = self.positions(x) if context is None else context
        pooled = F.adaptive_avg_pool2d(F.gelu(self.sr(x.permute(0, 3, 1, 2))), positions.pooled_size)
        pooled = self.norm(pooled.flatten(2).transpose(1, 2))
        q = split_heads(self.q(x).flatten(1, 2), self.num_heads)  # (B, heads, N, D)
        k, v = self.kv(x).unflatten(-1, (2 * self.num_heads, -1)).chunk(2, dim=3)  # (B, H, W, heads, D)
        pooled_k, pooled_v = split_heads(self.kv(pooled), 2 * self.num_heads).chunk(2, dim=1)
        q, k, pooled_k, learned = self.prepare(q, k, pooled_k, positions.log_length)

        near = (neighbours(k, self.window) @ q.unsqueeze(-1)).squeeze(-1) + self.relative_pos_bias_local.unsqueeze(1)
        near = near.masked_fill(~positions.on_map, -torch.inf)  # (B, heads, N, window²)
        bias = self.cpb(positions.offsets, x.shape[1:3], positions.pooled_size)
        far = q @ pooled_k.transpose(-2, -1) + bias.to(q.dtype)  # (B, heads, N, h * w)
        weights = torch.cat([near, far], dim=-1).softmax(-1)
        near, far = weights.split([near.shape[-1], far.shape[-1]], dim=-1)
        if learned is not None:
            near = near + learned
        return (near.unsqueeze(-2) @ neighbours(v, self.window)).squeeze(-2) + far @ pooled_v

    def prepare(
        self, q: Tensor, k: Tensor, pooled_k: Tensor, log_length: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return queries and keys whose products are the scores, and what is added to the neighbours' weights.

        Args:
            q: Queries (B, heads, H * W, D).
            k: Keys of the map (B, H, W, heads, D).
            pooled_k: Keys of the pooled map (B, heads, h * w, D).
            log_length: Logarithm of each token's number of keys, (H * W, 1).

        Returns:
            The three tensors, scaled, and a tensor (B, heads, H * W, window²), or None to add nothing.
        """
        return q * q.shape[-1] ** -0.5, k, pooled_k, None


def neighbours(x: Tensor, window: int) -> Tensor:
    """Return the neighbours of each token of a map (B, H, W, heads, D): (B, heads, H * W, window², D).

    Neighbours beyond the edge of the map are zeros.
    """
    pad = window // 2
    x = F.pad(x, (0, 0, 0, 0, pad, pad, pad, pad)).unfold(1, window, 1).unfold(2, window, 1)
    return x.permute(0, 3, 1, 2, 5, 6, 4).flatten(4, 5).flatten(2, 3)
