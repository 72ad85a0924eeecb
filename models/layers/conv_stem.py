"""Stems of convolutions, or of ConvNeXt's stages, as in FAN (Zhou et al., ICML 2022, arXiv:2204.12451)."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models._manipulate import named_apply
from timm.models.convnext import ConvNeXtStage, _init_weights
from timm.models.xcit import conv3x3
from torch import Tensor, nn

from retinue.utils.arithmetic import padding

# Divisors of the final width after each convolution of a stem, by the stem's stride
STRIDES = {16: (8, 4, 2, 1), 8: (4, 2, 1), 4: (4, 1)}


class ConvStem(nn.Module):
    """Convolutions of stride 2 from images (B, in_chans, h, w) to a map (B, dim, ⌈h / patch⌉, ⌈w / patch⌉).

    Args:
        in_chans: Channels of the images.
        dim: Channels of the map.
        patch: Side of a patch in pixels: 16, 8 or 4.
    """

    def __init__(self, in_chans: int, dim: int, patch: int):
        super().__init__()
        layers: list[nn.Module] = []
        for divisor in STRIDES[patch]:
            layers += [conv3x3(in_chans, dim // divisor, 2), nn.GELU()]
            in_chans = dim // divisor
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class UnbiasedLayerNorm2d(nn.LayerNorm):
    """Layer norm of the channels of (B, C, H, W) by the unbiased variance, which FAN's authors use after the stem."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, keepdim=True)
        x = (x - mean) * torch.rsqrt(variance + self.eps)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class HybridStem(nn.Module):
    """Two stages of ConvNeXt, of strides 4 and 8, and a convolution, to a map (B, dim, ⌈h / 16⌉, ⌈w / 16⌉).

    Images (B, in_chans, h, w) are zero-padded on the right and at the bottom to whole patches of 16 pixels.

    Args:
        in_chans: Channels of the images.
        dim: Channels of the map.
        depths: Number of blocks in each of the two stages.
    """

    def __init__(self, in_chans: int, dim: int, depths: Sequence[int]):
        super().__init__()
        norm: Any = partial(UnbiasedLayerNorm2d, eps=1e-6)
        stages = [
            ConvNeXtStage(width, out, stride=stride, depth=depth, ls_init_value=1e-6, conv_mlp=True, norm_layer=norm)
            for width, out, stride, depth in zip((128, 128), (128, 256), (1, 2), depths, strict=True)
        ]
        stem = nn.Sequential(nn.Conv2d(in_chans, 128, 4, 4), LayerNorm2d(128, eps=1e-6))
        self.backbone = nn.Sequential(OrderedDict(stem=stem, stages=nn.Sequential(*stages)))
        named_apply(_init_weights, self.backbone)
        self.proj = nn.Conv2d(256, dim, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, padding(x.shape[3], 16), 0, padding(x.shape[2], 16)))
        return self.proj(self.backbone(x))
