"""Linear classifier of each place of a map, which measures how good the features of a frozen backbone are.

Papers: DINOv2 (Oquab et al., TMLR 2024, arXiv:2304.07193, https://github.com/facebookresearch/dinov2, Apache-2.0) and
DINOv3 (Siméoni et al., 2025, arXiv:2508.10104), whose linear evaluations on ADE20K have this head. Written after their
text and checked against the first's code.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearHead(nn.Module):
    """Concatenate maps at the resolution of the first one, normalise each channel, and classify each place.

    Takes any number of maps (B, in_channels[i], h_i, w_i) and returns logits (B, num_classes, h_0, w_0).

    Args:
        in_channels: Number of channels of each map.
        num_classes: Number of classes.
        dropout: Probability of dropping a whole channel before the classifier; DINOv3 has 0.1.
    """

    any_maps = True

    def __init__(self, in_channels: Sequence[int], num_classes: int, *, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.BatchNorm2d(sum(in_channels))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(sum(in_channels), num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.get_parameter("bias"))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        first, *others = maps
        resized = [F.interpolate(m, first.shape[2:], mode="bilinear") for m in others]
        return self.classifier(self.dropout(self.norm(torch.cat([first, *resized], dim=1))))
