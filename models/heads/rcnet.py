"""RCNet's neck: a reverse feature pyramid (RevFP) and a network that shifts channels across scales (CSN).

Paper: RCNet: Reverse Feature Pyramid and Cross-scale Shift Network for Object Detection (Zong et al., ACM MM 2021,
arXiv:2110.12130). Written after the authors' repository, https://github.com/TempleX98/RCNet (Apache-2.0), and a
description of the paper. Where the two differ, we follow the code:

- The shift of levels is cyclic: the finest and the coarsest levels receive channels from each other, not zeros.
- The weights of the feature-guided upsampling have a mean of 1 over the map. Of its formula, the temperature T is
  learned, and d is the number of channels.
- The weight that balances a level against the next coarser level is computed before that level is guided.
- Levels beyond those of the backbone are made by a 1 x 1 convolution, batch norm and max-pooling.

The authors released no weights, so the figures of the paper have not been checked with weights.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

# Numbers of levels by which channels are shifted; positive numbers shift to coarser levels.
SHIFTS = (-1, 1, -2, 2)
# A level's channels are divided into this number of groups, and each shift moves one group: a quarter of all channels.
CHANNEL_GROUPS = 16


def conv1x1_bn(in_dim: int, dim: int) -> list[nn.Module]:
    """Return the layers of a 1 x 1 convolution with batch norm."""
    conv = nn.Conv2d(in_dim, dim, 1, bias=False)
    nn.init.xavier_uniform_(conv.weight)
    return [conv, nn.BatchNorm2d(dim)]


class DeformableConv(nn.Module):
    """Deformable 3 x 3 convolution, which moves and weights its samples (DCNv2, Zhu et al., 2018, arXiv:1811.11168).

    Takes a map (B, dim, H, W) and returns the same shape. The samples' offsets and weights are computed from the map.

    Args:
        dim: Number of channels.
        groups: Number of groups of channels that have offsets and weights of their own.
    """

    def __init__(self, dim: int, groups: int = 2):
        super().__init__()
        bound = (9 * dim) ** -0.5
        self.weight = nn.Parameter(torch.empty(dim, dim, 3, 3).uniform_(-bound, bound))
        self.conv_offset = nn.Conv2d(dim, groups * 3 * 9, 3, padding=1)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.conv_offset(x).tensor_split((self.conv_offset.out_channels * 2 // 3,), dim=1)
        # torchvision's CPU kernels do not support bfloat16.
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, offset, weight, mask = (t.to(dtype) for t in (x, offset, self.weight, mask.sigmoid()))
        return deform_conv2d(x, offset, weight, padding=(1, 1), mask=mask).to(self.weight.dtype)


def relu_conv_bn(dim: int) -> nn.Sequential:
    """Return ReLU, a deformable convolution and batch norm, in this order."""
    return nn.Sequential(nn.ReLU(), DeformableConv(dim), nn.BatchNorm2d(dim))


class Balance(nn.Conv2d):
    """Weight (B, 1, 1, 1) of the first of two maps in their weighted sum, between 0 and 1; the initial weight is 1/2.

    The weight is computed from the means of the two maps (B, dim, H, W) over their positions.
    """

    def __init__(self, dim: int):
        super().__init__(2 * dim, 1, 1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        means = [t.mean(dim=(2, 3), keepdim=True) for t in (x, y)]
        return super().forward(torch.cat(means, dim=1)).sigmoid()


class Guide(nn.Module):
    """Weight of each position of an upsampled coarser map, computed from this map and the finer map.

    Takes the finer map and the upsampled map (B, dim, H, W), and returns weights (B, 1, H, W) with a mean of 1 over the
    positions. Initially, all weights are 1.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.scale = dim**-0.5
        self.conv = nn.Conv2d(2 * dim, 1, 3, padding=1)
        self.temperature = nn.Parameter(torch.ones(1))
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, above: Tensor) -> Tensor:
        scores = self.temperature * self.scale * self.conv(torch.cat((x, above), dim=1))
        H, W = x.shape[2:]
        return scores.flatten(1).softmax(dim=1).view_as(scores) * (H * W)


class FuseAbove(nn.Module):
    """Fuse a map (B, dim, H, W) with the upsampled map of the next coarser level."""

    def __init__(self, dim: int):
        super().__init__()
        self.guide, self.balance = Guide(dim), Balance(dim)

    def forward(self, x: Tensor, above: Tensor) -> Tensor:
        above = F.interpolate(above, x.shape[2:], mode="bilinear")
        weight = self.balance(x, above)
        return weight * x + (1 - weight) * self.guide(x, above) * above


class FuseBelow(nn.Module):
    """Fuse a map (B, dim, ⌈H / 2⌉, ⌈W / 2⌉) with the downsampled map (B, dim, H, W) of the next finer level."""

    def __init__(self, dim: int):
        super().__init__()
        self.balance = Balance(dim)

    def forward(self, x: Tensor, below: Tensor) -> Tensor:
        below = F.max_pool2d(below, 2, ceil_mode=True)
        weight = self.balance(x, below)
        return weight * x + (1 - weight) * below


class Node(nn.Module):
    """Level of RevFP, which fuses its map with the next coarser input map, then with the next finer output map.

    Takes the level's map (B, dim, H, W), the input map of the next coarser level and the output of the next finer
    level's node, and returns (B, dim, H, W).

    Args:
        dim: Number of channels.
        above: Whether there is a coarser level.
        below: Whether there is a finer level.
    """

    def __init__(self, dim: int, above: bool, below: bool):
        super().__init__()
        self.above = FuseAbove(dim) if above else None
        self.between = relu_conv_bn(dim) if above and below else nn.Identity()
        self.below = FuseBelow(dim) if below else None
        self.out = relu_conv_bn(dim)

    def forward(self, x: Tensor, above: Tensor | None, below: Tensor | None) -> Tensor:
        if self.above is not None:
            x = self.between(self.above(x, above))
        if self.below is not None:
            x = self.below(x, below)
        return self.out(x)


class GlobalContext(nn.Module):
    """Summarise tokens (B, N, dim) in one vector (B, dim): a mean with computed weights, then a linear layer."""

    renames = ((r"^channel_agg\.", "score."), (r"^trans\.", "proj."))

    def __init__(self, dim: int):
        super().__init__()
        self.score, self.proj = nn.Linear(dim, 1), nn.Linear(dim, dim)
        for layer in (self.score, self.proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.score(x).softmax(dim=1)
        return self.proj((weights * x).sum(dim=1))


class CrossScaleShift(nn.Module):
    """Cross-scale shift network, which exchanges channels between all levels and adds a global context.

    Takes maps (B, dim, H_i, W_i), finest first, and returns a tuple of maps of the same shapes. For the exchange, all
    levels are resized to the second finest level's size.

    Args:
        dim: Number of channels of every level, a multiple of `CHANNEL_GROUPS`.
        levels: Number of levels, at least 2.
    """

    renames = (
        (r"^msm\.aggregation\.(\d)\.0\.conv\.", r"mix.\1.0."),
        (r"^msm\.aggregation\.(\d)\.0\.bn\.", r"mix.\1.1."),
        (r"^msm\.aggregation\.(\d)\.1\.", r"mix.\1.3."),
        (r"^(scale|spatial)Context\.", r"\1_context."),
    )

    def __init__(self, dim: int, levels: int):
        super().__init__()
        shifted_dim = dim + len(SHIFTS) * (dim // CHANNEL_GROUPS)
        self.mix = nn.ModuleList()
        for _ in range(levels):
            last = nn.Conv2d(dim, dim, 1)
            nn.init.xavier_uniform_(last.weight)
            nn.init.zeros_(last.get_parameter("bias"))
            self.mix.append(nn.Sequential(*conv1x1_bn(shifted_dim, dim), nn.ReLU(), last))
        self.scale_context, self.spatial_context = GlobalContext(dim), GlobalContext(dim)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        size = maps[1].shape[2:]
        resized = [F.adaptive_max_pool2d(maps[0], size), *(F.interpolate(m, size, mode="bilinear") for m in maps[1:])]
        x = torch.stack(resized, dim=1)  # (B, levels, dim, H, W)
        shifted = torch.cat((shift(x), x), dim=2)
        x = x + torch.stack([mix(level) for mix, level in zip(self.mix, shifted.unbind(1), strict=True)], dim=1)
        context = self.scale_context(x.mean(dim=(3, 4))) + self.spatial_context(x.mean(dim=1).flatten(2).mT)
        finest, *coarser = (x + context[:, None, :, None, None]).unbind(1)
        updates = [F.interpolate(finest, maps[0].shape[2:], mode="bilinear")]
        updates += [F.adaptive_max_pool2d(level, m.shape[2:]) for level, m in zip(coarser, maps[1:], strict=True)]
        return tuple(m + update for m, update in zip(maps, updates, strict=True))


def shift(x: Tensor) -> Tensor:
    """Shift the first four groups of channels cyclically between the levels, by one of the `SHIFTS` each.

    Args:
        x: All levels at one size, (B, levels, C, H, W).

    Returns:
        The shifted channels only, (B, levels, C / 4, H, W).
    """
    groups = x.split(x.shape[2] // CHANNEL_GROUPS, dim=2)
    shifted = [group.roll(levels, dims=1) for group, levels in zip(groups[: len(SHIFTS)], SHIFTS, strict=True)]
    return torch.cat(shifted, dim=2)


class RCNet(nn.Module):
    """RCNet's neck, which takes the place of a feature pyramid network (FPN).

    Takes maps of a backbone (B, in_channels[i], H_i, W_i), finest first, and returns a tuple of `num_outs` maps with
    `out_channels` channels: one of each map's size, and then coarser ones. After a map of H x W, the next is
    ⌈H / 2⌉ x ⌈W / 2⌉. In training, batch norm needs more than one position or image at the coarsest level.

    Args:
        in_channels: Numbers of channels of the maps, finest first; RetinaNet uses the maps of strides 8, 16 and 32.
        out_channels: Number of channels of the returned maps, a multiple of 16.
        num_outs: Number of returned maps, at least 2 and at least the number of maps in `in_channels`.

    Raises:
        ValueError: `out_channels` is not a multiple of 16, or `num_outs` is too small.
    """

    renames = (
        (r"^lateral_convs\.(\d)\.conv\.", r"laterals.\1.0."),
        (r"^lateral_convs\.(\d)\.bn\.", r"laterals.\1.1."),
        (r"^extra_downsamples\.(\d)\.0\.conv\.", r"extras.\1.0."),
        (r"^extra_downsamples\.(\d)\.0\.bn\.", r"extras.\1.1."),
        (r"^RevFP\.p7\.weight\.0\.", "nodes.4.below.balance."),
        (r"^RevFP\.p(\d)\.", lambda match: f"nodes.{int(match[1]) - 3}."),
        (r"^(nodes\.\d)\.weight\.0\.", r"\1.above.balance."),
        (r"^(nodes\.\d)\.weight\.1\.", r"\1.below.balance."),
        (r"^(nodes\.\d)\.spatial_weight\.", r"\1.above.guide.conv."),
        (r"^(nodes\.\d)\.temp$", r"\1.above.guide.temperature"),
        (r"^(nodes\.\d)\.pre_fusion\.", r"\1.between."),
        (r"^(nodes\.\d)\.post_fusion\.", r"\1.out."),
        (r"^(nodes\.\d\.(?:between|out))\.conv\.", r"\1.1."),
        (r"^(nodes\.\d\.(?:between|out))\.bn\.", r"\1.2."),
        (r"^CSN\.", "shift."),
    )

    def __init__(self, in_channels: Sequence[int], out_channels: int = 256, num_outs: int = 5):
        super().__init__()
        if out_channels % CHANNEL_GROUPS:
            raise ValueError(f"RCNet's out_channels must be a multiple of {CHANNEL_GROUPS}, not {out_channels}")
        min_outs = max(2, len(in_channels))
        if num_outs < min_outs:
            raise ValueError(f"RCNet with {len(in_channels)} maps returns at least {min_outs}, not num_outs={num_outs}")
        self.laterals = nn.ModuleList(nn.Sequential(*conv1x1_bn(width, out_channels)) for width in in_channels)
        self.extras = nn.ModuleList(
            nn.Sequential(*conv1x1_bn(out_channels, out_channels), nn.MaxPool2d(2, ceil_mode=True))
            for _ in range(num_outs - len(in_channels))
        )
        self.nodes = nn.ModuleList(Node(out_channels, above=i < num_outs - 1, below=i > 0) for i in range(num_outs))
        self.shift = CrossScaleShift(out_channels, num_outs)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        levels: list[Any] = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for extra in self.extras:
            levels.append(extra(levels[-1]))
        fused: list[Any] = []
        for node, x, above in zip(self.nodes, levels, [*levels[1:], None], strict=True):
            fused.append(node(x, above, fused[-1] if fused else None))
        return self.shift(fused)
