"""Convolutions with their norms."""

import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(in_dim: int, dim: int, stride: int = 2) -> list[nn.Module]:
    """Return a 3 x 3 convolution and a batch norm: (B, in_dim, H, W) to (B, dim, ⌈H / stride⌉, ⌈W / stride⌉)."""
    return [nn.Conv2d(in_dim, dim, 3, stride=stride, padding=1), nn.BatchNorm2d(dim)]


class HalvingConv2d(nn.Conv2d):
    """3 x 3 convolution with a stride of 2 and TensorFlow's padding: (B, C, H, W) to (B, D, ⌈H / 2⌉, ⌈W / 2⌉).

    One row is padded at the bottom, and one at the top if H is odd; columns likewise. timm's form takes a maximum in
    the size of the padding, which `torch.compile` simplifies for minutes if the image's size is variable.

    Args:
        in_dim: Channels of the map.
        dim: Channels of the result.
        groups: Number of groups of channels.
        bias: Add a learned bias.
    """

    def __init__(self, in_dim: int, dim: int, groups: int = 1, bias: bool = True):
        super().__init__(in_dim, dim, 3, 2, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        return super().forward(F.pad(x, (W % 2, 1, H % 2, 1)))
