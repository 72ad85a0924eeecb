"""Convolutions with their norms."""

from torch import nn


def conv_bn(in_dim: int, dim: int, stride: int = 2) -> list[nn.Module]:
    """Return a 3 x 3 convolution and a batch norm: (B, in_dim, H, W) to (B, dim, ⌈H / stride⌉, ⌈W / stride⌉)."""
    return [nn.Conv2d(in_dim, dim, 3, stride=stride, padding=1), nn.BatchNorm2d(dim)]
