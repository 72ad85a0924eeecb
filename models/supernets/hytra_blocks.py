"""Parts of BossNAS's supernet: a block for each choice, and the projection of maps of any stage.

BossNAS: Li et al., ICCV 2021, arXiv:2103.12424. Written after the paper and what the authors' repository,
changlin31/BossNAS, computes; none of its code is here.
"""

from collections.abc import Sequence
from typing import Any

from timm.models.nextvit import PatchEmbed
from torch import Tensor, nn

from models.backbones.bossnas import HEAD_DIM, HEADS, Attention, AttentionBlock, ConvBlock
from models.supernets.hytra_space import Choice


class Entry(nn.Module):
    """First part of a block for a map of the stage before: (B, in_dim, H, W) to the shortcut and the bottleneck."""

    def __init__(self, in_dim: int, dim: int, width: int):
        super().__init__()
        self.downsample = PatchEmbed(in_dim, dim, 2)
        self.conv1 = nn.Conv2d(in_dim, width, 1, bias=False)
        self.peg = nn.Conv2d(width, width, 3, 2, 1, groups=width)
        self.bn1 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.downsample(x), self.bn1(self.peg(self.conv1(x)))


class CandidateBlock(nn.Module):
    """Block of `BossNet` for one choice; maps of the stage before have an entry of their own.

    Args:
        choice: The choice.
        dim: Channels inside the convolutional blocks of the first stage.
        stem: Channels of the stem if the candidate reads the stem's map, which has the first stage's resolution.
    """

    def __init__(self, choice: Choice, dim: int, stem: int | None = None):
        super().__init__()
        width = dim * 2**choice.stage
        inner = width if choice.conv else HEADS[choice.stage] * HEAD_DIM
        common: Any = {"in_dim": stem or 4 * width, "dim": 4 * width, "width": inner, "act": nn.ReLU}
        common["stride"] = 2 if stem and choice.stage else 1
        if choice.conv:
            self.block = ConvBlock(squeeze=False, **common)
        else:
            self.block = AttentionBlock(mixer=Attention(inner, HEADS[choice.stage]), context=None, **common)
        nn.init.zeros_(self.block.bn3.weight)
        self.reduce = None if stem or not choice.stage else Entry(2 * width, 4 * width, inner)

    def forward(self, x: Tensor, reduces: bool) -> Tensor:
        """Run the block; `reduces` says that the map `x` is of the stage before."""
        return self.block.join(*self.reduce(x)) if reduces and self.reduce is not None else self.block(x)

    def block_state(self, reduces: bool) -> dict[str, Tensor]:
        """Return the state dict of `BossNet`'s block."""
        state = self.block.state_dict()
        return state | self.reduce.state_dict() if reduces and self.reduce is not None else state


class Projector(nn.Module):
    """Vectors (B, out) from a map of any stage, which is first brought to the resolution of the last stage."""

    def __init__(self, dims: Sequence[int], hidden: int, out: int):
        super().__init__()
        self.reduce = nn.ModuleList()
        for stage, dim in enumerate(dims[:-1]):
            side = 2 ** (len(dims) - 1 - stage)
            self.reduce.append(
                nn.Sequential(
                    nn.Conv2d(dim, dim, side, side, groups=dim, bias=False),
                    nn.Conv2d(dim, dims[-1], 1, bias=False),
                    nn.BatchNorm2d(dims[-1]),
                )
            )
        self.reduce.append(nn.Identity())
        self.mlp = mlp(dims[-1], hidden, out)

    def forward(self, x: Tensor, stage: int) -> Tensor:
        return self.mlp(self.reduce[stage](x).mean((2, 3)))


def mlp(dim: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))
