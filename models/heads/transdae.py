"""TransDAE's decoder: blocks of dual attention, over positions and over channels, on skips that interact across scales.

Paper: TransDAE: Dual Attention Mechanism in a Hierarchical Transformer for Efficient Medical Image Segmentation (Azad
et al., 2024, arXiv:2409.02018), written after its abstract; there is no public code. The block is that of DAE-Former
(Azad et al., MICCAI Workshops 2023, arXiv:2212.13504; repository mindflow-institue/DAEFormer, MIT), from which TransDAE
departs. The paper's figures are not comparable: widths, depths and the interaction's details are ours, and the encoder
is any backbone.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.xcit import XCA
from torch import Tensor, nn

from models.heads.upsample import PatchExpand, create_upsample
from models.layers.pvt_v2 import DepthwiseMlp
from ops.linear import linear_attention


class EfficientAttention(nn.Module):
    """Attention of all tokens (B, N, dim) to all tokens with a cost linear in N.

    Each query is normalised by a softmax over the channels, and each channel of the keys by a softmax over the tokens.
    Paper: Efficient Attention: Attention with Linear Complexities (Shen et al., WACV 2021, arXiv:1812.01243).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(linear_attention(self.qkv(x), 1, features="softmax", normalization="none"))


class DualAttentionBlock(nn.Module):
    """Attention over positions, an MLP, attention over channels and an MLP, each added to the map (B, C, H, W).

    The attention over positions is efficient attention. In the attention over channels (XCiT, arXiv:2106.09681) a
    channel's feature vector is its whole map, with a length of 1, and each head has a learned factor on the scores.

    Args:
        dim: Number C of channels, a multiple of `num_heads`.
        num_heads: Number of groups of channels that attend to each other; efficient attention has one head.
        mlp_ratio: Hidden channels of the MLPs relative to `dim`.
    """

    def __init__(self, dim: int, num_heads: int = 8, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(dim) for _ in range(4))
        self.spatial, self.channel = EfficientAttention(dim), XCA(dim, num_heads)
        self.mlp1, self.mlp2 = (DepthwiseMlp(dim, round(mlp_ratio * dim)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        size = x.shape[1:3]
        x = x + self.spatial(self.norm1(x).flatten(1, 2)).unflatten(1, size)
        x = x + self.mlp1(self.norm2(x))
        x = x + self.channel(self.norm3(x).flatten(1, 2)).unflatten(1, size)
        x = x + self.mlp2(self.norm4(x))
        return x.permute(0, 3, 1, 2)


class InterScaleInteraction(nn.Module):
    """Efficient attention among the positions of all levels of a pyramid, added to each level.

    Takes and returns maps (B, channels[i], H_i, W_i), finest first. Each level is averaged to the size of the coarsest
    one and projected to its width, with a learned vector for the level; the attention runs over the tokens of all
    levels, and each level's result is projected back and resized to the level.

    Args:
        channels: Number of channels of each level, finest first.
    """

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        dim = channels[-1]
        self.reduce = nn.ModuleList(nn.Linear(width, dim) for width in channels)
        self.level_embed = nn.Parameter(torch.empty(len(channels), dim))
        trunc_normal_(self.level_embed, std=0.02)
        self.norm, self.attn = nn.LayerNorm(dim), EfficientAttention(dim)
        self.restore = nn.ModuleList(nn.Conv2d(dim, width, 1) for width in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        size = (maps[-1].shape[2], maps[-1].shape[3])
        tokens = [
            reduce(F.adaptive_avg_pool2d(x, size).flatten(2).transpose(1, 2)) + embed
            for reduce, x, embed in zip(self.reduce, maps, self.level_embed, strict=True)
        ]
        mixed = self.attn(self.norm(torch.cat(tokens, dim=1))).transpose(1, 2).chunk(len(maps), dim=2)
        return [
            x + F.interpolate(restore(y.unflatten(2, size)), x.shape[2:], mode="bilinear")
            for restore, x, y in zip(self.restore, maps, mixed, strict=True)
        ]


class TransDAEHead(nn.Module):
    """TransDAE's decoder: four maps of a backbone to logits of the image's size.

    Takes maps (B, in_channels[i], ⌈H / 4 / 2^i⌉, ⌈W / 4 / 2^i⌉) and returns logits (B, num_classes, 4 * ⌈H / 4⌉,
    4 * ⌈W / 4⌉). A map is projected to its level's width, and the levels interact. From the coarsest level on, the map
    is upsampled, concatenated with the next finer one, projected and passed through blocks of dual attention. The last
    map is expanded by 4.

    Args:
        in_channels: Numbers of channels of the maps, finest first.
        num_classes: Number of classes.
        channels: Width of each level, finest first; multiples of `num_heads`.
        depth: Number of blocks at each level but the coarsest one.
        num_heads: Number of heads of the attention over channels.
        upsample: Upsampler of `models/heads/upsample.py`: "expand", "bilinear" or "wau".

    Raises:
        ValueError: The numbers of maps and of widths differ, a width is not such a multiple, or the upsampler is
            unknown.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: Sequence[int] = (64, 128, 320, 512),
        depth: int = 2,
        num_heads: int = 8,
        upsample: str = "expand",
    ):
        super().__init__()
        if len(channels) != len(in_channels):
            raise ValueError(f"channels must be {len(in_channels)} widths, one for each map, not {list(channels)}")
        if any(width % num_heads for width in channels):
            raise ValueError(f"channels must be multiples of the {num_heads} heads, not {list(channels)}")
        self.laterals = nn.ModuleList(
            nn.Conv2d(in_dim, width, 1) for in_dim, width in zip(in_channels, channels, strict=True)
        )
        self.interaction = InterScaleInteraction(channels)
        finer, coarser = channels[:-1], channels[1:]
        self.upsamples = nn.ModuleList(
            create_upsample(upsample, width, deep) for width, deep in zip(finer, coarser, strict=True)
        )
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2 * width, width, 1), *(DualAttentionBlock(width, num_heads) for _ in range(depth)))
            for width in finer
        )
        self.expand = PatchExpand(channels[0], channels[0], factor=4)
        self.classifier = nn.Conv2d(channels[0], num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *skips, x = self.interaction([lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)])
        levels = zip(skips, self.upsamples, self.levels, strict=True)
        for skip, upsample, level in reversed(list(levels)):
            x = level(torch.cat((upsample(skip, x), skip), dim=1))
        return self.classifier(self.expand.enlarge(x))
