"""RCNet's neck: Reverse Feature Pyramid and Cross-scale Shift Network for Object Detection (Zong et al., ACM MM 2021,
arXiv:2110.12130).

Written after the authors' repository, TempleX98/RCNet (Apache-2.0), and a description of the paper; where they differ,
the code is followed:

- The levels are shifted in a circle, so that a level at an end receives from the other end, not zeros.
- The weights of the feature-guided upsampling have a mean of 1 over the map; T is learned, and d is the width.
- The balance of a level with the one above is read from that one before it is guided.
- Further levels are made by a 1 x 1 convolution, batch norm and max-pooling.

The authors released no weights, so their figures have not been checked with any.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

SHIFTS = (-1, 1, -2, 2)  # of levels, towards coarser ones
PARTS = 16  # of a level's channels; one moves with each shift, so a quarter of them in all


def conv1x1_bn(in_dim: int, dim: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_dim, dim, 1, bias=False)
    nn.init.xavier_uniform_(conv.weight)
    return [conv, nn.BatchNorm2d(dim)]


class DeformableConv(nn.Module):
    """3 x 3 convolution whose samples are moved and weighted (DCNv2, Zhu et al., 2018, arXiv:1811.11168).

    (B, dim, H, W) to the same shape. Offsets and weights follow from the map, for each of `groups` of the channels.
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
        wide = torch.promote_types(x.dtype, torch.float32)  # torchvision's kernels for the CPU know no bfloat16
        x, offset, weight, mask = (t.to(wide) for t in (x, offset, self.weight, mask.sigmoid()))
        return deform_conv2d(x, offset, weight, padding=(1, 1), mask=mask).to(self.weight.dtype)


def relu_conv_bn(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), DeformableConv(dim), nn.BatchNorm2d(dim))


class Balance(nn.Conv2d):
    """The weight (B, 1, 1, 1) of the first of two maps (B, dim, H, W) in their sum, from their means; 1/2 at first."""

    def __init__(self, dim: int):
        super().__init__(2 * dim, 1, 1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        means = [t.mean(dim=(2, 3), keepdim=True) for t in (x, y)]
        return super().forward(torch.cat(means, dim=1)).sigmoid()


class Guide(nn.Module):
    """Weights (B, 1, H, W), with a mean of 1, of the places of an upsampled map, from it and the finer map's; even at
    first."""

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
    """A map (B, dim, H, W) with that of the next coarser level, upsampled."""

    def __init__(self, dim: int):
        super().__init__()
        self.guide, self.balance = Guide(dim), Balance(dim)

    def forward(self, x: Tensor, above: Tensor) -> Tensor:
        above = F.interpolate(above, x.shape[2:], mode="bilinear")
        weight = self.balance(x, above)
        return weight * x + (1 - weight) * self.guide(x, above) * above


class FuseBelow(nn.Module):
    """A map (B, dim, ⌈H / 2⌉, ⌈W / 2⌉) with that of the next finer level, (B, dim, H, W), downsampled."""

    def __init__(self, dim: int):
        super().__init__()
        self.balance = Balance(dim)

    def forward(self, x: Tensor, below: Tensor) -> Tensor:
        below = F.max_pool2d(below, 2, ceil_mode=True)
        weight = self.balance(x, below)
        return weight * x + (1 - weight) * below


class Node(nn.Module):
    """A level of RevFP: its map (B, dim, H, W), fused with that of the next coarser level of the net, and then with the
    result for the next finer one, where there are such."""

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
    """Tokens (B, N, dim) to one vector (B, dim): their mean with learned weights, and a linear layer."""

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
    """Exchange channels among all levels at the size of the second: maps (B, dim, H_i, W_i), finest first, to the same
    shapes."""

    renames = (
        (r"^msm\.aggregation\.(\d)\.0\.conv\.", r"mix.\1.0."),
        (r"^msm\.aggregation\.(\d)\.0\.bn\.", r"mix.\1.1."),
        (r"^msm\.aggregation\.(\d)\.1\.", r"mix.\1.3."),
        (r"^(scale|spatial)Context\.", r"\1_context."),
    )

    def __init__(self, dim: int, levels: int):
        super().__init__()
        wide = dim + len(SHIFTS) * (dim // PARTS)
        self.mix = nn.ModuleList()
        for _ in range(levels):
            last = nn.Conv2d(dim, dim, 1)
            nn.init.xavier_uniform_(last.weight)
            nn.init.zeros_(last.get_parameter("bias"))
            self.mix.append(nn.Sequential(*conv1x1_bn(wide, dim), nn.ReLU(), last))
        self.scale_context, self.spatial_context = GlobalContext(dim), GlobalContext(dim)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        size = maps[1].shape[2:]
        resized = [F.adaptive_max_pool2d(maps[0], size), *(F.interpolate(m, size, mode="bilinear") for m in maps[1:])]
        x = torch.stack(resized, dim=1)  # (B, levels, dim, H, W)
        shifted = torch.cat((shift(x), x), dim=2)
        x = x + torch.stack([mix(level) for mix, level in zip(self.mix, shifted.unbind(1), strict=True)], dim=1)
        context = self.scale_context(x.mean(dim=(3, 4))) + self.spatial_context(x.mean(dim=1).flatten(2).mT)
        finest, *rest = (x + context[:, None, :, None, None]).unbind(1)
        back = [F.interpolate(finest, maps[0].shape[2:], mode="bilinear")]
        back += [F.adaptive_max_pool2d(level, m.shape[2:]) for level, m in zip(rest, maps[1:], strict=True)]
        return tuple(m + b for m, b in zip(maps, back, strict=True))


def shift(x: Tensor) -> Tensor:
    """The first channels of (B, levels, C, H, W), a 16th for each of the `SHIFTS`, moved by so many levels."""
    parts = x.split(x.shape[2] // PARTS, dim=2)
    return torch.cat([part.roll(by, dims=1) for part, by in zip(parts, SHIFTS, strict=False)], dim=2)


class RCNet(nn.Module):
    """Maps of a net (B, in_channels[i], H_i, W_i), finest first, to a tuple of `num_outs` maps of `out_channels`, the
    further ones each half as large as the one before; a neck in FPN's place.

    A map is ⌈H / 2⌉ x ⌈W / 2⌉ where the one before it is H x W. In training, batch norm needs more than one place or
    image at the coarsest level.

    Args:
        in_channels: of the maps, from the finest to be used: RetinaNet's are those of strides 8, 16 and 32.
        out_channels: a multiple of 16.

    Raises:
        ValueError: `out_channels` does not divide, or there are fewer levels than maps, or fewer than two.
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
        if out_channels % PARTS:
            raise ValueError(f"RCNet's out_channels must be a multiple of {PARTS}, not {out_channels}")
        if num_outs < max(2, len(in_channels)):
            raise ValueError(f"RCNet gives at least {max(2, len(in_channels))} maps here, not num_outs={num_outs}")
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
