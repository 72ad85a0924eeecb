"""Focal modulation of FocalNet (Yang et al., NeurIPS 2022, arXiv:2203.11926).

Written after the paper and the authors' repository, microsoft/FocalNet (MIT); the weights have the authors' names.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ops.registry import FIRST, Place, register_op


@register_op("focal_modulation")
class FocalModulation(nn.Module):
    """Queries are multiplied by a modulator: a gated sum of convolutions of growing range and the mean of the map.

    Each level is a depthwise convolution of the level before it. The gates of a token weight the levels. Cost is linear
    in H * W.

    Args:
        dim: Number of channels.
        num_heads: Without effect.
        kernels: Side of each level's convolution, odd; default (3, 5, 7), as in the paper's nets with a large receptive
            field.
    """

    family = "convolution"

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, kernels: Sequence[int] = (3, 5, 7)):
        super().__init__()
        if not kernels or any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f"kernels must be one or more odd numbers, not {list(kernels)}")
        self.widths = (dim, dim, len(kernels) + 1)
        self.f = nn.Linear(dim, sum(self.widths))
        self.focal_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False), nn.GELU())
            for kernel in kernels
        )
        self.h = nn.Conv2d(dim, dim, 1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, context, gates = self.f(x).split(self.widths, dim=-1)
        levels = [context.permute(0, 3, 1, 2)]
        for layer in self.focal_layers:
            levels.append(layer(levels[-1]))
        *level_gates, mean_gate = gates.permute(0, 3, 1, 2).split(1, dim=1)  # (B, 1, H, W) each
        modulator = mean_gate * F.gelu(levels[-1].mean((2, 3), keepdim=True))
        for gate, level in zip(level_gates, levels[1:], strict=True):
            modulator = modulator + gate * level
        return self.proj(q * self.h(modulator).permute(0, 2, 3, 1))
