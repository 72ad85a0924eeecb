"""Learned positions of a grid of tokens."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def grid_of(img_size: int | tuple[int, int], stride: int) -> tuple[int, int]:
    """Rows and columns of the map with that stride of an image."""
    H, W = (img_size, img_size) if isinstance(img_size, int) else img_size
    return -(-H // stride), -(-W // stride)


def resize_positions(
    table: Tensor, grid: Sequence[int], size: Sequence[int], extra: int = 0, mode: str = "bicubic"
) -> Tensor:
    """Interpolate positions (1, extra + h * w, C) from one grid (h, w) to another; the first `extra` are of no grid."""
    if tuple(grid) == tuple(size):
        return table
    first, rest = table[:, :extra], table[:, extra:].unflatten(1, tuple(grid)).permute(0, 3, 1, 2)
    rest = F.interpolate(rest, tuple(size), mode=mode)
    return torch.cat([first, rest.flatten(2).transpose(1, 2)], dim=1)


def fit_positions(table: Tensor, grid: Sequence[int], extra: int, mode: str = "bicubic") -> Tensor:
    """Positions of a checkpoint, learned for a square grid and a class token or none, for another net.

    Those of a class token that the net lacks are left out. What cannot be fitted is returned as it is.
    """
    side = math.isqrt(table.shape[1])
    lacks = table.shape[1] - side**2 - extra
    return resize_positions(table[:, lacks:], (side, side), grid, extra, mode) if lacks in (0, 1) else table
