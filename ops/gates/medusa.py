"""Multi-scale encoder-decoder self-attention, MEDUSA (Aboutalebi et al., Frontiers in Medicine 2022, arXiv:2110.06063).

Written after the abstract: the authors' code could not be found. One body that reads the image, light heads at all
scales, and the product with the features are the paper's; the layers of body and heads are ours.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch import Tensor, nn

from ops.gate_registry import register_gate

# Channels between the two convolutions of a head
HEAD_CHANNELS = 16


class Body(nn.Module):
    """Encoder and decoder from images (B, in_chans, h, w) to one map of scores (B, 1, ⌈h / 2⌉, ⌈w / 2⌉).

    Args:
        in_chans: Number of image channels.
        width: Channels of the first map; each of the three further maps has half the sides and twice the channels.
    """

    def __init__(self, in_chans: int, width: int):
        super().__init__()
        widths = [width * 2**i for i in range(4)]
        self.encoder = nn.ModuleList(
            nn.Sequential(ConvNormAct(inner, outer, 3, stride=2), ConvNormAct(outer, outer, 3))
            for inner, outer in pairwise([in_chans, *widths])
        )
        self.decoder = nn.ModuleList(ConvNormAct(inner + outer, outer, 3) for outer, inner in pairwise(widths))
        self.score = nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = [images]
        for layer in self.encoder:
            maps.append(layer(maps[-1]))
        x = maps[-1]
        for layer, skip in zip(reversed(self.decoder), reversed(maps[1:-1]), strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = layer(torch.cat([x, skip], dim=1))
        return self.score(x)


@register_gate("medusa")
class MultiScaleEncoderDecoder(nn.Module):
    """A place receives itself times a factor from a head that reads the map and the scores of one body for all heads.

    The body is an encoder and decoder of the image that all gates of the net share. A head joins the body's scores,
    resized, with the mean of the map's channels, and computes the factor by two convolutions and a sigmoid.

    Args:
        dim: Number of channels.
        width: Channels of the body's first map; default 32.
    """

    at = "stage"

    def __init__(self, dim: int, width: int = 32):
        super().__init__()
        self.head = nn.Sequential(ConvNormAct(2, HEAD_CHANNELS, 3), nn.Conv2d(HEAD_CHANNELS, 1, 1))

    @staticmethod
    def make_context(in_chans: int, width: int = 32) -> nn.Module:
        """Return the body, whose output all gates of a net receive."""
        return Body(in_chans, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        scores = F.interpolate(context, size=x.shape[2:], mode="bilinear", align_corners=False)
        return x + x * self.head(torch.cat([scores, x.mean(1, keepdim=True)], dim=1)).sigmoid()
