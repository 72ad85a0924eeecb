"""Orders in which scans visit the tokens of a map.

An order is given by keys: a map (H, W) of integers, all different, and tokens are visited from the smallest key to the
largest. So -keys is the reversed order, any size of the map has every order, and no padding is needed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def positions(size: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the rows (H, 1) and columns (1, W) of a map of `size` (H, W)."""
    H, W = size
    return torch.arange(H, device=device)[:, None], torch.arange(W, device=device)[None]


def raster(i: Tensor, j: Tensor) -> Tensor:
    """Return the keys of lines one after the other, all in the same direction.

    Args:
        i: Index of the line: (H, 1). For columns instead of rows, pass the columns as `i` and the rows as `j`.
        j: Position in the line: (1, W).
    """
    return i * j.numel() + j


def snake(i: Tensor, j: Tensor) -> Tensor:
    """Return the keys of lines one after the other, every second one backwards; the arguments are those of `raster`."""
    return i * j.numel() + torch.where(i % 2 == 0, j, j.numel() - 1 - j)


def diagonals(i: Tensor, j: Tensor) -> Tensor:
    """Return the keys of the diagonals i + j = 0, 1, ...: i falls along even diagonals and rises along odd ones."""
    diagonal = i + j
    return diagonal * i.numel() + torch.where(diagonal % 2 == 0, i.numel() - 1 - i, i)


def spiral(i: Tensor, j: Tensor) -> Tensor:
    """Return the keys of a spiral from (0, 0) inwards: first along the row 0, then down the last column."""
    H, W = i.numel(), j.numel()
    ring = torch.minimum(torch.minimum(i, H - 1 - i), torch.minimum(j, W - 1 - j))
    height, width = H - 1 - 2 * ring, W - 1 - 2 * ring
    y, x = i - ring, j - ring
    down_or_back = torch.where(x == width, width + y, 2 * width + height - x)
    up = 2 * (width + height) - y
    place = torch.where(y == 0, x, torch.where((x == width) | (y == height), down_or_back, up))
    return ring * (2 * (H + W)) + place


def atrous_windows(i: Tensor, j: Tensor, window: int, rate: int) -> Tensor:
    """Return the keys of dilated windows, which are visited one after the other in raster order.

    A window covers window * rate tokens along each side. Inside it the `rate`² dilated grids follow each other, and
    each grid is visited in raster order.
    """
    side = window * rate
    key = atrous_group(i, j, side)
    for place, base in ((i % rate, rate), (j % rate, rate), (i % side // rate, window), (j % side // rate, window)):
        key = key * base + place
    return key


def atrous_group(i: Tensor, j: Tensor, side: int) -> Tensor:
    """Return the index of each token's window of `side` x `side` tokens, in raster order: (H, W)."""
    return i // side * ((j.numel() - 1) // side + 1) + j // side


def to_orders(keys: Sequence[Tensor]) -> Tensor:
    """Return the tokens' raster indices in K orders (K, N) for K maps of keys (H, W), with N = H * W."""
    return torch.stack([key.flatten() for key in keys]).argsort(dim=-1)


def gather_orders(x: Tensor, orders: Tensor) -> Tensor:
    """Bring the tokens of a map into K orders: (B, H, W, C) and (K, N) to (B, K, N, C)."""
    tokens = x.flatten(1, 2)
    # One call for each order, so that no call adds gradients of one token in an arbitrary order
    return torch.stack([tokens.index_select(1, order) for order in orders.unbind()], dim=1)


def scatter_orders(y: Tensor, orders: Tensor, size: Sequence[int]) -> Tensor:
    """Undo `gather_orders` for each order: (B, K, N, C) to maps (B, K, H, W, C) of `size` (H, W)."""
    places = orders.argsort(dim=-1).unbind()
    maps = [tokens.index_select(1, place) for tokens, place in zip(y.unbind(1), places, strict=True)]
    return torch.stack(maps, dim=1).unflatten(2, tuple(size))
