"""Inverted bottlenecks (MBConv) of CoAtNet's and MOAT's kind, for maps of any size."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from timm.models.maxxvit import MaxxVitConvCfg, MbConvBlock
from torch import Tensor, nn

from models.layers.conv import HalvingConv2d
from ops import parse_mixers
from ops.registry import Spec


class HalvingPool(nn.Module):
    """Average pooling with a stride of 2: (B, C, H, W) to (B, C, ⌈H / 2⌉, ⌈W / 2⌉).

    Cells beyond the map do not count. They are at the bottom and on the right, and for 3 x 3 cells and an odd side also
    at the top or on the left, as in TensorFlow.

    Args:
        size: Side of the pooled squares, 2 or 3.
    """

    def __init__(self, size: int = 2):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        padding = [int(self.size == 3 and side % 2 == 1) for side in x.shape[2:]]
        return F.avg_pool2d(x, self.size, 2, padding, ceil_mode=True, count_include_pad=False)


def mbconv(in_dim: int, dim: int, stride: int = 1, drop_path: float = 0.0, pool: int = 2, **config) -> MbConvBlock:
    """Return timm's inverted bottleneck, whose shortcut takes maps with odd sides too.

    Args:
        in_dim: Channels of the map.
        dim: Channels of the result.
        stride: Stride, 1 or 2; with 1, `in_dim` must be `dim`.
        drop_path: Drop path rate.
        pool: Side of the squares that the shortcut averages if the stride is 2.
        **config: Arguments of `timm.models.maxxvit.MaxxVitConvCfg`.
    """
    block = MbConvBlock(in_dim, dim, stride, cfg=MaxxVitConvCfg(**config), drop_path=drop_path)
    if stride == 2:
        block.shortcut.pool = HalvingPool(pool)
        if config.get("padding") == "same":
            strided: Any = block.conv2_kxk
            block.conv2_kxk = HalvingConv2d(strided.in_channels, strided.out_channels, strided.groups, bias=False)
    return block


def hybrid_block_name(stage: int, block: int) -> str:
    """Return our name of a block in files that count the stages after the stem, and blocks with a stride as blocks.

    Here the stem is a stage, and the block with a stride that begins a stage is its `downsample`.
    """
    return f"stages.{stage + 1}.blocks.{block - 1}." if block else f"stages.{stage + 1}.downsample."


def hybrid_mixers(
    mixers: Spec | Sequence | None, default: Sequence[Spec | None], depths: Sequence[int]
) -> list[list[Spec] | None]:
    """Return the specs of the blocks of each stage, or None for a stage of inverted bottlenecks.

    Args:
        mixers: One spec for all stages, a list of one entry for each stage as in `ops.parse_mixers`, or None for
            `default`. The entry None makes a stage of inverted bottlenecks.
        default: Entry of each stage if `mixers` is None.
        depths: Number of blocks in each stage.

    Raises:
        ValueError: As in `ops.parse_mixers`.
    """
    if isinstance(mixers, (str, Mapping)):
        mixers = [mixers] * len(depths)
    entries = list(default if mixers is None else mixers)
    specs = parse_mixers(["full" if entry is None else entry for entry in entries], depths)
    return [None if entry is None else spec for entry, spec in zip(entries, specs, strict=True)]
