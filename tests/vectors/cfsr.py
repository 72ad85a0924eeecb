"""CFSR, a convolutional net for super-resolution (Wu et al., IEEE TIP 2024, arXiv:2401.05633).

Paper: Transforming Image Super-Resolution: A ConvFormer-based Efficient Approach. Written after the paper and the
authors' repository, Aitical/CFSR (no licence). The net returns images, for which the project has no task, so it only
serves the reference vectors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ops import create_ops, parse_mixers
from ops.registry import Spec
from tests.vectors.edge_ffn import EdgeFFN

# Mean of red, green and blue, which the net subtracts and adds again
MEAN = (0.4488, 0.4371, 0.4040)


class Block(nn.Module):
    """Op and edge-preserving MLP, each on a normed map, scaled by channel and added: (B, H, W, C) to the same shape.

    Args:
        dim: Number of channels C.
        mixer: The op.
        ratio: Hidden channels of the MLP relative to `dim`.
        masks: As in `EdgeFFN`.
        merged: As in `EdgeFFN`.
    """

    renames = (
        (r"^layer_scale_(\d)$", r"scale\1"),
        (r"^attn\.norm\.", "norm1."),
        (r"^mlp\.norm\.", "norm2."),
        (r"^attn\.", "mixer."),
    )

    def __init__(self, dim: int, mixer: nn.Module, ratio: int = 2, masks: str = "true", merged: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = EdgeFFN(dim, ratio, masks, merged)
        self.scale1 = nn.Parameter(torch.full((dim,), 1e-6))
        self.scale2 = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1 * self.mixer(self.norm1(x))
        return x + self.scale2 * self.mlp(self.norm2(x))


class Group(nn.Module):
    """Blocks, and a linear layer that is added to their output: (B, H, W, C) to the same shape.

    Args:
        blocks: The blocks.
        dim: Number of channels C.
    """

    def __init__(self, blocks: Sequence[nn.Module], dim: int):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.conv = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x + self.conv(x)


class CFSR(nn.Module):
    """Images (B, 3, H, W), from 0 to 1, to images (B, 3, scale * H, scale * W).

    Args:
        scale: Factor by which both sides grow: 2, 3 or 4 in the paper.
        dim: Channels of all blocks.
        depths: Number of blocks in each group.
        mixers: Token mixers, as `ops.parse_mixers` reads them.
        ratio: Hidden channels of the MLPs relative to `dim`.
        masks: As in `EdgeFFN`.
        merged: Build the form of the authors' released weights.
    """

    mean: Tensor
    renames = ((r"^layers\.", "groups."), (r"^upsample\.0\.", "upsample."))

    def __init__(
        self,
        scale: int = 4,
        dim: int = 48,
        depths: Sequence[int] = (6, 6),
        mixers: Spec | Sequence = "large_kernel",
        ratio: int = 2,
        masks: str = "true",
        merged: bool = False,
    ):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.conv_first = nn.Conv2d(3, dim, 3, padding=1)
        self.groups = nn.ModuleList()
        for stage, specs in enumerate(parse_mixers(mixers, depths)):
            ops, _ = create_ops(specs, dim, 1, stage=stage, stride=1)
            self.groups.append(Group([Block(dim, op, ratio, masks, merged) for op in ops], dim))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.conv_after_body = nn.Conv2d(dim, dim, 3, padding=1)
        self.upsample = nn.Conv2d(dim, 3 * scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv_first(x - self.mean)
        maps = first.permute(0, 2, 3, 1)
        for group in self.groups:
            maps = group(maps)
        maps = self.conv_after_body(self.norm(maps).permute(0, 3, 1, 2))
        return self.shuffle(self.upsample(maps + first)) + self.mean
