"""U-Net's decoder and a feature pyramid that upsample by window attention, WAU (`models/heads/upsample.py`).

Paper: More than Encoder: Introducing Transformer Decoder to Upsample (Li et al., ICPR 2022, arXiv:2106.10637), which
puts WAU into U-Net and into other segmentors with lateral connections; written after its abstract. U-Net: Ronneberger
et al., MICCAI 2015, arXiv:1505.04597. The decoder's widths and the pyramid are ours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch import Tensor, nn

from models.heads.upsample import WindowAttentionUpsample, create_upsample


class UNetHead(nn.Module):
    """U-Net's decoder: four maps of a backbone to logits at stride 4.

    Takes maps (B, in_channels[i], ⌈H / 4 / 2^i⌉, ⌈W / 4 / 2^i⌉) and returns logits (B, num_classes, ⌈H / 4⌉, ⌈W / 4⌉).
    A map is projected to its level's width. From the coarsest level on, the map is upsampled, concatenated with the
    next finer one and passed through two convolutions of 3 x 3 positions with batch norm and ReLU.

    Args:
        in_channels: Numbers of channels of the maps, finest first.
        num_classes: Number of classes.
        channels: Width of each level, finest first.
        upsample: Upsampler of `models/heads/upsample.py`: "wau", "bilinear" (plain U-Net) or "expand".
        dropout: Probability of dropping a whole channel before the classifier.

    Raises:
        ValueError: The numbers of maps and of widths differ, or the upsampler is unknown.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: Sequence[int] = (64, 128, 256, 512),
        upsample: str = "wau",
        dropout: float = 0.1,
    ):
        super().__init__()
        if len(channels) != len(in_channels):
            raise ValueError(f"channels must be {len(in_channels)} widths, one for each map, not {list(channels)}")
        self.laterals = nn.ModuleList(
            nn.Conv2d(in_dim, width, 1) for in_dim, width in zip(in_channels, channels, strict=True)
        )
        finer, coarser = channels[:-1], channels[1:]
        self.upsamples = nn.ModuleList(
            create_upsample(upsample, width, deep) for width, deep in zip(finer, coarser, strict=True)
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(ConvNormAct(2 * width, width, 3), ConvNormAct(width, width, 3)) for width in finer
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels[0], num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *skips, x = (lateral(x) for lateral, x in zip(self.laterals, maps, strict=True))
        levels = zip(skips, self.upsamples, self.blocks, strict=True)
        for skip, upsample, block in reversed(list(levels)):
            x = block(torch.cat((skip, upsample(skip, x)), dim=1))
        return self.classifier(self.dropout(x))


class WAUPyramid(nn.Module):
    """Feature pyramid (arXiv:1612.03144) whose top-down path upsamples by window attention.

    Takes maps (B, in_channels[i], H_i, W_i), finest first, and returns a tuple of `num_outs` maps with `out_channels`
    channels: one of each map's size, and then coarser ones by subsampling the last one. After a map of H x W, the next
    is ⌈H / 2⌉ x ⌈W / 2⌉.

    Args:
        in_channels: Numbers of channels of the maps, finest first.
        out_channels: Number of channels of the returned maps.
        num_outs: Number of returned maps, at least the number of maps in `in_channels`.

    Raises:
        ValueError: `num_outs` is too small.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, num_outs: int):
        super().__init__()
        levels = len(in_channels)
        if num_outs < levels:
            raise ValueError(f"a pyramid of {levels} maps returns at least {levels}, not num_outs={num_outs}")
        self.extras = num_outs - levels
        self.laterals = nn.ModuleList(nn.Conv2d(width, out_channels, 1) for width in in_channels)
        self.upsamples = nn.ModuleList(WindowAttentionUpsample(out_channels, out_channels) for _ in range(levels - 1))
        self.outs = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_channels)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for i in reversed(range(len(levels) - 1)):
            levels[i] = self.upsamples[i](levels[i], levels[i + 1])
        levels = [out(x) for out, x in zip(self.outs, levels, strict=True)]
        for _ in range(self.extras):
            levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        return tuple(levels)
