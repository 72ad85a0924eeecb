"""Learned positions of a grid of tokens."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from retinue.utils.arithmetic import ceil_div


def grid_of(img_size: int | tuple[int, int], stride: int) -> tuple[int, int]:
    """Return the rows and columns of an image's map with that stride; `img_size` is a side or (height, width)."""
    H, W = (img_size, img_size) if isinstance(img_size, int) else img_size
    return ceil_div(H, stride), ceil_div(W, stride)


def resize_positions(
    table: Tensor, grid: Sequence[int], size: Sequence[int], extra: int = 0, mode: str = "bicubic"
) -> Tensor:
    """Interpolate learned positions from one grid to another.

    Args:
        table: Positions (1, extra + h * w, C).
        grid: Rows and columns (h, w) of the table.
        size: Rows and columns (H, W) of the result.
        extra: Number of first positions that belong to no grid, such as a class token's; they are kept.
        mode: Mode of `torch.nn.functional.interpolate`.

    Returns:
        Positions (1, extra + H * W, C).
    """
    if tuple(grid) == tuple(size):
        return table
    extra_positions, grid_positions = table[:, :extra], table[:, extra:]
    grid_positions = grid_positions.unflatten(1, tuple(grid)).permute(0, 3, 1, 2)
    grid_positions = F.interpolate(grid_positions, tuple(size), mode=mode)
    return torch.cat([extra_positions, grid_positions.flatten(2).transpose(1, 2)], dim=1)


def fit_positions(table: Tensor, grid: Sequence[int], extra: int, mode: str = "bicubic") -> Tensor:
    """Fit a checkpoint's positions to a net's grid.

    The positions were learned for a square grid, with or without extra tokens. For a net without extra tokens, the
    positions of a class token and of a distillation token are left out. A table that does not fit in this way is
    returned unchanged.

    Args:
        table: Positions (1, N, C) of the checkpoint.
        grid: Rows and columns of the net's positions.
        extra: Number of the net's first positions that belong to no grid, such as a class token's.
        mode: Mode of `torch.nn.functional.interpolate`.
    """
    side = math.isqrt(table.shape[1])
    superfluous = table.shape[1] - side**2 - extra
    if superfluous and (extra or superfluous not in (1, 2)):
        return table
    return resize_positions(table[:, superfluous:], (side, side), grid, extra, mode)
