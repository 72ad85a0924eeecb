"""Stages of pyramids that hand on tokens and a class token, as in ViT-ResNAS (Liao et al., 2021, arXiv:2109.00642)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.nextvit import ConvNormAct
from torch import Tensor, nn

from models.hierarchical import Stage
from models.layers.downsample import PatchConv2d
from models.layers.position import fit_positions, resize_positions
from ops.losses import Losses
from retinue.utils.arithmetic import padding


class TokenStem(nn.Module):
    """Patches, class token and positions: images (B, C, h, w) to tokens (B, E + H * W, dim) and (H, W).

    Images are zero-padded on the right and at the bottom to whole patches.

    Args:
        in_chans: Number of image channels C.
        dim: Channels of the tokens.
        hidden: Channels of three convolutions before the patches, which halve the resolution; 0 leaves them out.
        patch: Side of a patch in pixels; even with `hidden`.
        grid: Rows and columns of the map that the positions are learned for; others are interpolated.
        extra: Number of class tokens E, 0 or 1.
    """

    def __init__(self, in_chans: int, dim: int, hidden: int, patch: int, grid: tuple[int, int], extra: int):
        super().__init__()
        self.patch, self.grid, self.extra = patch, grid, extra
        self.convs = None
        if hidden:
            convs = [ConvNormAct(hidden if i else in_chans, hidden, stride=1 if i else 2) for i in range(3)]
            self.convs = nn.ModuleList(convs)
        self.proj = PatchConv2d(hidden, dim, patch // 2) if hidden else PatchConv2d(in_chans, dim, patch)
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, extra + grid[0] * grid[1], dim), std=0.02))
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, dim), std=0.02)) if extra else None

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = F.pad(x, (0, padding(x.shape[3], self.patch), 0, padding(x.shape[2], self.patch)))
        if self.convs is not None:
            x = self.convs[0](x)
            x = x + self.convs[2](self.convs[1](x))
        x = self.proj(x)
        size, x = (x.shape[2], x.shape[3]), x.flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + resize_positions(self.pos_embed, self.grid, size, self.extra), size

    def no_weight_decay(self) -> set[str]:
        return set() if self.cls_token is None else {"cls_token"}

    def resize_table(self, name: str, value: Tensor) -> Tensor:
        return fit_positions(value, self.grid, self.extra) if name == "pos_embed" else value


class SpatialReduction(nn.Module):
    """Halving of the map with a residual connection: tokens (B, E + H * W, C) and (H, W) to half the sides.

    The residual connection averages 2 x 2 tokens and adds channels of zeros.

    Args:
        in_dim: Channels C.
        dim: Channels of the result, at least `in_dim`.
        grid: Rows and columns of the reduced map that the positions are learned for; others are interpolated.
        extra: Number of class tokens E, 0 or 1.
    """

    def __init__(self, in_dim: int, dim: int, grid: tuple[int, int], extra: int):
        super().__init__()
        self.grid, self.widening = grid, dim - in_dim
        self.norm = nn.LayerNorm(in_dim, eps=1e-6)
        self.patch_reduce = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)
        self.token_transform = nn.Linear(in_dim, dim) if extra else None
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, grid[0] * grid[1], dim), std=0.02))

    def forward(self, state: tuple[Tensor, tuple[int, int]]) -> tuple[Tensor, tuple[int, int]]:
        x, size = state
        return self.reduce(x, self.norm(x), size)

    def reduce(self, x: Tensor, normed: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Return the reduced tokens and their (H, W).

        Args:
            x: Tokens (B, E + H * W, C).
            normed: The same tokens after the norm.
            size: Rows H and columns W of the map.
        """
        H, W = size
        token, residual = x[:, : -H * W], x[:, -H * W :].transpose(1, 2).unflatten(2, (H, W))
        reduced = self.patch_reduce(normed[:, -H * W :].transpose(1, 2).unflatten(2, (H, W)))
        size = (reduced.shape[2], reduced.shape[3])
        residual = F.avg_pool2d(residual, 2, ceil_mode=True).flatten(2).transpose(1, 2)
        reduced = reduced.flatten(2).transpose(1, 2) + resize_positions(self.pos_embed, self.grid, size)
        reduced = reduced + F.pad(residual, (0, self.widening))
        if self.token_transform is None:
            return reduced, size
        token = self.token_transform(normed[:, : -H * W]) + F.pad(token, (0, self.widening))
        return torch.cat([token, reduced], dim=1), size

    def resize_table(self, name: str, value: Tensor) -> Tensor:
        return fit_positions(value, self.grid, 0) if name == "pos_embed" else value


class TokenStage(Stage):
    """Stage on tokens (B, E + H * W, C) and (H, W), of which the first E are class tokens; the first takes images."""

    def forward(self, x: Any, losses: Losses | None = None) -> Any:
        x, size = self.downsample(x)
        first_map = x[:, -size[0] * size[1] :].unflatten(1, size)
        return self.run_blocks(x, first_map, losses, size), size
