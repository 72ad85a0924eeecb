"""Continuous position bias of Swin Transformer V2: an MLP turns log-spaced offsets into biases for a map of any size.

Liu et al., CVPR 2022, arXiv:2111.09883; repository microsoft/Swin-Transformer (MIT).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retinue.utils.arithmetic import ceil_div


class Offsets(NamedTuple):
    """Offsets from queries, the tokens of a map (H, W), to keys, the tokens of its adaptively pooled map (h, w).

    Attributes:
        table: Every offset that occurs, (down, right), log-spaced: (table rows, table columns, 2).
        rows: Row of `table` for each row of queries and each row of keys: (H, h).
        columns: Column of `table` for each column of queries and each column of keys: (W, w).
    """

    table: Tensor
    rows: Tensor
    columns: Tensor


class MapOffsets(nn.Module):
    """Compute the `Offsets` of a map (B, H, W, C); they depend on its size alone, so all blocks of a stage share them.

    Args:
        stride: Side of the image divided by the side of the map.
        pool: Side of the map divided by the side of the pooled map, which is rounded down and at least 1.
        pretrain_size: Side in pixels of the pretraining images; offsets are relative to the side of their maps.
        bias_size: Side in pixels of the images whose maps' offsets are computed instead, whatever the size of the map;
            `ContinuousBias` then interpolates. None computes the offsets of the map itself.

    Raises:
        ValueError: `pool`, `pretrain_size` or `bias_size` is less than 1.
    """

    def __init__(self, stride: int, pool: int, pretrain_size: int, bias_size: int | None):
        super().__init__()
        if min(pool, pretrain_size, 1 if bias_size is None else bias_size) < 1:
            given = f"{pool}, {pretrain_size} and {bias_size}"
            raise ValueError(f"pool, pretrain_size and bias_size must be at least 1, not {given}")
        self.pool = pool
        self.unit = max(pretrain_size // stride - 1, 1)
        self.side = None if bias_size is None else ceil_div(bias_size, stride)

    def forward(self, x: Tensor) -> Offsets:
        size = x.shape[1:3] if self.side is None else (self.side, self.side)
        like = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        (down, rows), (right, columns) = (axis_offsets(n, self.pooled_side(n), self.unit, like) for n in size)
        return Offsets(torch.stack(torch.meshgrid(down, right, indexing="ij"), dim=-1), rows, columns)

    def pooled_side(self, side: int) -> int:
        """Return the side of the pooled map for a side of the map."""
        return max(side // self.pool, 1)


def axis_offsets(queries: int, keys: int, unit: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the offsets from queries to keys along one axis, and which of them lies between each query and key.

    Args:
        queries: Number of queries along the axis.
        keys: Number of keys along the axis; each is the mean of the tokens in its bin of adaptive pooling.
        unit: Number of tokens that is scaled to 8 before the logarithm.
        like: Tensor whose dtype and device the offsets have.

    Returns:
        Every offset that occurs, sign(o) * log2(1 + |o|) / 3, ascending: (offsets,); its index: (queries, keys).
    """
    key = torch.arange(keys, device=like.device)
    # The first token of each key's bin, and the token after its last
    first, end = key * queries // keys, ((key + 1) * queries + keys - 1) // keys
    # Twice the offset from the middle of each key's bin to each query, which is a whole number
    doubled = 2 * torch.arange(queries, device=like.device).unsqueeze(1) - (first + end - 1)
    largest = 2 * queries - 1 - ceil_div(queries, keys)
    # If all bins hold equally many tokens, offsets differ by whole tokens, otherwise by halves
    step = 1 if queries % keys else 2
    offsets = torch.arange(-largest, largest + 1, step, device=like.device).to(like.dtype) * (4 / unit)
    return offsets.sign() * torch.log2(1 + offsets.abs()) / 3, (doubled + largest) // step


class ContinuousBias(nn.Module):
    """Compute the position bias of each head from `Offsets` by an MLP with 512 hidden channels.

    If the offsets are those of a map of another size, the bias is interpolated bilinearly.

    Args:
        num_heads: Number of heads.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.fc1 = nn.Linear(2, 512)
        self.fc2 = nn.Linear(512, num_heads)

    def forward(self, offsets: Offsets, size: Sequence[int], pooled_size: Sequence[int]) -> Tensor:
        """Return the bias (heads, H * W, h * w).

        Args:
            offsets: Offsets of the same map, or of another one.
            size: Size (H, W) of the map of the queries.
            pooled_size: Size (h, w) of the map of the keys.
        """
        table, rows, columns = offsets
        bias = self.fc2(F.relu(self.fc1(table.to(self.fc1.weight.dtype))))
        bias = bias.index_select(0, rows.flatten()).index_select(1, columns.flatten())  # (H * h, W * w, heads)
        bias = bias.unflatten(1, columns.shape).unflatten(0, rows.shape).permute(4, 0, 2, 1, 3)  # (heads, H, W, h, w)
        offsets_size = bias.shape[1:3]
        if bias.shape[3:] != tuple(pooled_size):
            bias = F.interpolate(bias.flatten(1, 2), tuple(pooled_size), mode="bilinear").unflatten(1, offsets_size)
        bias = bias.flatten(3)
        if offsets_size != tuple(size):
            return F.interpolate(bias.permute(0, 3, 1, 2), tuple(size), mode="bilinear").flatten(2).transpose(1, 2)
        return bias.flatten(1, 2)
