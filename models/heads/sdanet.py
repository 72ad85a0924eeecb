"""SDANet's neck: Towards Real-World Prohibited Item Detection: A Large-Scale X-ray Benchmark (Wang et al., ICCV 2021,
arXiv:2108.07020).

Written after the paper and the authors' repository, bywang2018/security-dataset (Apache-2.0); the weights of its neck
load. The context block is that of GCNet (Cao et al., 2019, arXiv:1904.11492).
"""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ContextBlock(nn.Module):
    """Add to a map (B, C, H, W) one vector, made of a mean over its places with learned weights."""

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
    """All levels at the size of one: (B, channels, H, W) each, to what is added to that one."""

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
        channel, place = self.weights(reduce(torch.add, maps))
        mixed = ((c + p) * x for c, p, x in zip(channel, place, maps, strict=True))
        return self.context(reduce(torch.add, mixed))

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each level's weight by channel, (levels, B, channels, 1, 1), and by place, (levels, B, 1, H, W), from the sum
        of the levels; over the levels each sums to 1."""
        squeezed = self.squeeze(x.mean(dim=(2, 3), keepdim=True))
        summary = torch.cat((x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)), dim=1)
        channel = torch.stack([layer(squeezed) for layer in self.by_channel])
        place = torch.stack([layer(summary) for layer in self.by_place])
        return channel.softmax(dim=0), place.softmax(dim=0)


class SelectiveDenseAttention(nn.Module):
    """Maps (B, channels, H_i, W_i) of a feature pyramid, finest first, to a tuple of maps of the same shapes.

    To each level, a mixture of all levels is added that is weighted by channel and by place. For it, finer levels are
    max-pooled and coarser ones repeated to the level's size.

    In training, batch norm needs at least two images on a device, for it norms one vector of each.

    Args:
        channels: of every level.
        levels: how many there are.
        reduction: width of the layer between the levels' mean and their weights by channel.
        ratio: width of the context block's hidden layer, as a share of `channels`.

    Raises:
        ValueError: on a forward pass, there are not as many maps as levels.
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
    """The maps of a pyramid, finest first, at the size of the one at `level`."""
    size = maps[level].shape[2:]
    finer = [F.adaptive_max_pool2d(x, size) for x in maps[:level]]
    return [*finer, maps[level], *(F.interpolate(x, size, mode="nearest") for x in maps[level + 1 :])]
