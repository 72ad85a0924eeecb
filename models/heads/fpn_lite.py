"""Light decoder of a feature pyramid: linear layers bring all maps to one width, and their sum gives the logits.

The form is common practice for quick comparisons of backbones and follows no paper. It is Feature Pyramid Networks (Lin
et al., CVPR 2017, arXiv:1612.03144) without a convolution on each level, or SegFormer's decoder (Xie et al., NeurIPS
2021, arXiv:2105.15203) with a sum and one 3 x 3 convolution in place of the concatenation and its linear layer.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch import Tensor, nn


class FPNLiteHead(nn.Module):
    """Bring maps to one width by 1 x 1 convolutions, upsample and sum them, and classify after one 3 x 3 convolution.

    Takes any number of maps (B, in_channels[i], h_i, w_i), the finest first, and returns logits (B, num_classes, h_0,
    w_0).

    Args:
        in_channels: Number of channels of each map.
        num_classes: Number of classes.
        channels: Width of the decoder.
        dropout: Probability of dropping a whole channel before the classifier.
    """

    any_maps = True

    def __init__(self, in_channels: Sequence[int], num_classes: int, *, channels: int = 256, dropout: float = 0.1):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(in_dim, channels, 1) for in_dim in in_channels)
        self.smooth = ConvNormAct(channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.get_parameter("bias"))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x, *coarser = (lateral(m) for lateral, m in zip(self.laterals, maps, strict=True))
        for m in coarser:
            x = x + F.interpolate(m, x.shape[2:], mode="bilinear")
        return self.classifier(self.dropout(self.smooth(x)))
