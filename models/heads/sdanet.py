"""SDANet's neck, selective dense attention: each level of a feature pyramid receives a weighted sum of all levels.

Paper: Towards Real-World Prohibited Item Detection: A Large-Scale X-ray Benchmark (Wang et al., ICCV 2021,
arXiv:2108.07020). Written after the paper and the authors' repository, https://github.com/bywang2018/security-dataset
(Apache-2.0), whose weights of the neck load. The context block is that of GCNet (Cao et al., 2019, arXiv:1904.11492).
"""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ContextBlock(nn.Module):
    """Global context block, which adds one vector to all positions of a map (B, C, H, W).

    The vector is a transformed mean over the map's positions, whose weights are computed from the map.

    Args:
        channels: Number C of channels.
        hidden: Width of the hidden layer of the transformation.
    """

    renames = ((r"^conv_mask\.", "score."), (r"^channel_add_conv\.", "transform."))

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.LayerNorm([hidden, 1, 1]),
            nn.ReLU(),
            last := nn.Conv2d(hidden, channels, 1),
        )
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.score(x).flatten(2).softmax(dim=2)  # (B, 1, H * W)
        context = x.flatten(2) @ weights.transpose(1, 2)
        return x + self.transform(context.unsqueeze(3))


class LevelAttention(nn.Module):
    """Attention of one level to all levels, which computes the map that is added to the level.

    Takes one map (B, channels, H, W) for each level, all at this level's size, and returns (B, channels, H, W). Each
    map has a weight for each channel and a weight for each position; the sum of both multiplies the map.

    Args:
        channels: Number of channels of every level.
        levels: Number of levels.
        reduction: Width of the layer between the mean of the levels' sum and the weights by channel.
        hidden: Width of the context block's hidden layer.
    """

    renames = (
        (r"^channel_att\.fc\.", "squeeze."),
        (r"^channel_att\.fcs\.", "by_channel."),
        (r"^spatial_att\.conv\.", "by_place."),
        (r"^refine\.", "context."),
    )

    def __init__(self, channels: int, levels: int, reduction: int, hidden: int):
        super().__init__()
        self.squeeze = nn.Sequential(
            nn.Conv2d(channels, reduction, 1, bias=False), nn.BatchNorm2d(reduction), nn.ReLU()
        )
        self.by_channel = nn.ModuleList(nn.Conv2d(reduction, channels, 1) for _ in range(levels))
        self.by_place = nn.ModuleList(nn.Conv2d(2, 1, 7, padding=3, bias=False) for _ in range(levels))
        self.context = ContextBlock(channels, hidden)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        by_channel, by_position = self.weights(reduce(torch.add, maps))
        weighted = ((c + p) * x for c, p, x in zip(by_channel, by_position, maps, strict=True))
        return self.context(reduce(torch.add, weighted))

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the weights of the levels by channel and by position.

        Args:
            x: Sum of the levels' maps, (B, channels, H, W).

        Returns:
            Weights (levels, B, channels, 1, 1) and (levels, B, 1, H, W), each of which sums to 1 over the levels.
        """
        squeezed = self.squeeze(x.mean(dim=(2, 3), keepdim=True))
        summary = torch.cat((x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)), dim=1)
        by_channel = torch.stack([layer(squeezed) for layer in self.by_channel])
        by_position = torch.stack([layer(summary) for layer in self.by_place])
        return by_channel.softmax(dim=0), by_position.softmax(dim=0)


class SelectiveDenseAttention(nn.Module):
    """Selective dense attention, which refines each level of a feature pyramid with all levels.

    Takes maps (B, channels, H_i, W_i), finest first, and returns a tuple of maps of the same shapes. To each level,
    `LevelAttention` adds a sum of all levels that is weighted by channel and by position. For this sum, finer levels
    are max-pooled and coarser levels are upsampled (nearest neighbour) to the level's size.

    In training, batch norm needs at least two images per device: it normalises one vector of each image.

    Args:
        channels: Number of channels of every level.
        levels: Number of levels.
        reduction: Width of the layer between the mean of the levels' sum and the weights by channel.
        ratio: Width of the context block's hidden layer, relative to `channels`.

    Raises:
        ValueError: A forward pass receives another number of maps than `levels`.
    """

    renames = ((r"^selective_attention_(\d)\.", r"attention.\1."),)

    def __init__(self, channels: int = 256, levels: int = 5, reduction: int = 128, ratio: float = 1 / 16):
        super().__init__()
        hidden = int(channels * ratio)
        self.attention = nn.ModuleList(LevelAttention(channels, levels, reduction, hidden) for _ in range(levels))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if len(maps) != len(self.attention):
            raise ValueError(f"SelectiveDenseAttention was built for {len(self.attention)} levels, not {len(maps)}")
        return tuple(maps[i] + attention(at_level(maps, i)) for i, attention in enumerate(self.attention))


def at_level(maps: Sequence[Tensor], level: int) -> list[Tensor]:
    """Resize all maps of a pyramid (finest first) to the size of the map at index `level`."""
    size = maps[level].shape[2:]
    finer = [F.adaptive_max_pool2d(x, size) for x in maps[:level]]
    return [*finer, maps[level], *(F.interpolate(x, size, mode="nearest") for x in maps[level + 1 :])]
