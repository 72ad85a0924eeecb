"""Position biases for maps of any size, made from log-spaced offsets (Liu et al., CVPR 2022, arXiv:2111.09883)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Offsets(NamedTuple):
    """From the tokens of a map (H, W) to those of the map that adaptive pooling makes of it (h, w)."""

    table: Tensor  # (rows, columns, 2): each offset that occurs, log-spaced
    rows: Tensor  # (H, h): where in the table that of a query's row and a key's row is
    columns: Tensor  # (W, w)


class MapOffsets(nn.Module):
    """The offsets of a map (B, H, W, C), which depend on its size alone: the same in all blocks of a stage.

    Args:
        stride: of the map to the image.
        pool: how many times smaller than the map's the sides of the pooled map are, rounded down.
        pretrain_size: side of the images to whose maps offsets are relative.
        bias_size: side of the images whose maps' offsets are taken instead, if the bias is to be interpolated.
    """

    def __init__(self, stride: int, pool: int, pretrain_size: int, bias_size: int | None):
        super().__init__()
        if min(pool, pretrain_size, 1 if bias_size is None else bias_size) < 1:
            given = f"{pool}, {pretrain_size} and {bias_size}"
            raise ValueError(f"pool, pretrain_size and bias_size must be at least 1, not {given}")
        self.pool = pool
        self.unit = max(pretrain_size // stride - 1, 1)
        self.side = None if bias_size is None else -(-bias_size // stride)

    def forward(self, x: Tensor) -> Offsets:
        size = x.shape[1:3] if self.side is None else (self.side, self.side)
        like = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        (down, rows), (right, columns) = (axis_offsets(n, self.pooled(n), self.unit, like) for n in size)
        return Offsets(torch.stack(torch.meshgrid(down, right, indexing="ij"), dim=-1), rows, columns)

    def pooled(self, side: int) -> int:
        return max(side // self.pool, 1)


def axis_offsets(queries: int, keys: int, unit: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The offsets along a side, 8 of them `unit` tokens, and which is between each query and key: (queries, keys)."""
    key = torch.arange(keys, device=like.device)
    first, end = key * queries // keys, ((key + 1) * queries + keys - 1) // keys  # tokens that a key is the mean of
    twice = 2 * torch.arange(queries, device=like.device).unsqueeze(1) - (first + end - 1)  # the offset, in halves
    largest = 2 * queries - 1 - -(-queries // keys)
    step = 1 if queries % keys else 2  # keys of equally many tokens are at offsets of whole steps
    offsets = torch.arange(-largest, largest + 1, step, device=like.device).to(like.dtype) * (4 / unit)
    return offsets.sign() * torch.log2(1 + offsets.abs()) / 3, (twice + largest) // step


class ContinuousBias(nn.Module):
    """An MLP of offsets. The bias between tokens of another map is interpolated bilinearly."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.fc1 = nn.Linear(2, 512)
        self.fc2 = nn.Linear(512, num_heads)

    def forward(self, offsets: Offsets, size: Sequence[int], keys: Sequence[int]) -> Tensor:
        """(heads, H * W, h * w) for a map of `size` = (H, W) and a pooled one of size `keys` = (h, w)."""
        table, rows, columns = offsets
        bias = self.fc2(F.relu(self.fc1(table.to(self.fc1.weight.dtype))))
        bias = bias.index_select(0, rows.flatten()).index_select(1, columns.flatten())  # (H * h, W * w, heads)
        bias = bias.unflatten(1, columns.shape).unflatten(0, rows.shape).permute(4, 0, 2, 1, 3)  # (heads, H, W, h, w)
        made = bias.shape[1:3]
        if bias.shape[3:] != tuple(keys):
            bias = F.interpolate(bias.flatten(1, 2), tuple(keys), mode="bilinear").unflatten(1, made)
        bias = bias.flatten(3)
        if made != tuple(size):
            return F.interpolate(bias.permute(0, 3, 1, 2), tuple(size), mode="bilinear").flatten(2).transpose(1, 2)
        return bias.flatten(1, 2)
