"""Astroformer: More Data Might not be all you need for Classification (Dagli, ICLR workshop 2023, arXiv:2304.05350).

Written after the paper and the author's repository, Rishit-dagli/Astroformer (Apache-2.0), whose net is timm's CoAtNet
(Dai et al., NeurIPS 2021, arXiv:2106.04803) with three stages of convolutions and one of attention. timm's net takes
one image size; the net here takes any image size and any token mixer.
"""

import re
from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, stage_layout
from models.layers.mbconv import HalvingPool, hybrid_block_name, hybrid_mixers, mbconv
from models.layers.pool import NormedPool
from models.layers.position import grid_of
from models.layers.pvt_v2 import init_conv
from ops import create_op, create_ops
from ops.registry import Place, Spec

# Channels of an attention head
HEAD_DIM = 32


class AttentionBlock(nn.Module):
    """Token mixing and MLP, each added to the map: (B, in_dim, H, W) to (B, dim, ⌈H / stride⌉, ⌈W / stride⌉).

    Args:
        in_dim: Channels of the map.
        dim: Channels of the result.
        mixer: Op from `in_dim` to `dim` channels.
        drop_path: Drop path rate.
        stride: Stride, 1 or 2; with 1, `in_dim` must be `dim`.
    """

    def __init__(self, in_dim: int, dim: int, mixer: nn.Module, drop_path: float, stride: int = 1):
        super().__init__()
        self.pool = HalvingPool() if stride == 2 else nn.Identity()
        self.shortcut = nn.Conv2d(in_dim, dim, 1) if stride == 2 else nn.Identity()
        self.norm1 = nn.LayerNorm(in_dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.mlp.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=1e-6)

    def forward(self, x: Tensor, **context) -> Tensor:
        normed = self.pool(self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        x = self.shortcut(self.pool(x)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.mixer(normed.permute(0, 2, 3, 1), **context))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class Astroformer(HierarchicalBackbone):
    """Stem, three stages of inverted bottlenecks and one of attention; a block with a stride begins each stage.

    Args:
        img_size: Size of the images, in pixels, for whose last map the attention's relative positions are learned.
        dims: Number of channels of each stage.
        depths: Number of blocks in each stage after the one with a stride. The paper counts that one, too.
        stem: Number of channels of the stem.
        stem_stride: Stride of the stem.
        mixers: Token mixers of the blocks, as `ops.parse_mixers` reads them; the entry None makes a stage of inverted
            bottlenecks. Default: as above. The block with a stride in a stage of mixers has the paper's attention.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    out_indices = (1, 2, 3, 4)
    renames = (
        (r"^stem\.conv1\.", "stages.0.downsample.0."),
        (r"^stem\.norm1\.", "stages.0.downsample.1."),
        (r"^stem\.conv2\.", "stages.0.downsample.3."),
        (r"\.norm1\.norm\.", ".norm1."),
        (r"\.attn\.(rel_pos\.)?", ".mixer."),
        (r"^(stages\.4\.downsample\.shortcut)\.expand\.", r"\1."),
        (r"^head\.norm\.", "global_pool.norm."),
        (r"^head\.pre_logits\.fc\.", "global_pool.hidden.0."),
        (r"^head\.fc\.", "head."),
    )

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (1, 2, 4, 1),
        stem: int = 64,
        stem_stride: int = 2,
        mixers: Spec | Sequence | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        dims, strides, rates = stage_layout(dims, [1 + n for n in depths], drop_path_rate, 2 * stem_stride)
        paper: Any = {"name": "relative_conv_attention", "size": max(grid_of(img_size, strides[-1]))}
        specs = hybrid_mixers(mixers, (None, None, None, paper), depths)
        layers = (
            nn.Conv2d(in_chans, stem, 3, stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(stem),
            nn.GELU(),
            nn.Conv2d(stem, stem, 3, padding=1, bias=False),
        )
        stages = [Stage(nn.Sequential(*layers).apply(init_conv), ())]
        for i, (dim, rate) in enumerate(zip(dims, rates, strict=True)):
            in_dim = dims[i - 1] if i else stem
            blocks: list[nn.Module]
            stage_specs, contexts = specs[i], []
            if stage_specs is None:
                first = mbconv(in_dim, dim, 2, rate[0]).apply(init_conv)
                blocks = [mbconv(dim, dim, drop_path=r).apply(init_conv) for r in rate[1:]]
            else:
                heads = dim // HEAD_DIM
                size = max(grid_of(img_size, strides[i]))
                place = Place(i, 0, depths[i], strides[i])
                op = create_op("relative_conv_attention", in_dim, heads, place=place, size=size, out_dim=dim)
                first = AttentionBlock(in_dim, dim, op, rate[0], stride=2)
                ops, contexts = create_ops(stage_specs, dim, heads, stage=i, stride=strides[i])
                blocks = [AttentionBlock(dim, dim, op, r) for op, r in zip(ops, rate[1:], strict=True)]
            stages.append(Stage(first, blocks, contexts))
        super().__init__(stages, [stem, *dims], [stem_stride, *strides], nn.Identity(), in_chans=in_chans, **kwargs)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if isinstance(self.head, nn.Linear):
            self.head.reset_parameters()

    def reset_pool(self, global_pool: str) -> None:
        if global_pool:
            self.global_pool = NormedPool(global_pool, self.num_features, 1e-6, self.num_features)
        else:
            super().reset_pool(global_pool)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the author's weights, in which a stage's first block is the one with a stride.

        The rows of the author's projections to queries, keys and values are ordered by head first.
        """
        if "stem.conv1.weight" not in state:
            return super().checkpoint_filter(state)
        renamed = {}
        for key, value in state.items():
            if ".qkv." in key:
                value = value.unflatten(0, (-1, 3, HEAD_DIM)).transpose(0, 1).flatten(0, 2)
            if block := re.match(r"stages\.(\d)\.blocks\.(\d+)\.", key):
                key = hybrid_block_name(int(block[1]), int(block[2])) + key.removeprefix(block[0])
            renamed[key] = value
        return super().checkpoint_filter(renamed)


_FIXED = {"pool_size": None, "fixed_input_size": True}
default_cfgs = generate_default_cfgs(
    {f"astroformer_{i}": imagenet_cfg(**_FIXED) for i in range(6)}
    | {"astroformer_nano": imagenet_cfg(input_size=(3, 32, 32), **_FIXED)}
)


@register_model
def astroformer_nano(pretrained: bool = False, **kwargs) -> Astroformer:
    """Return a small net of our own for small images and CPUs; 32 pixels give maps of 16, 8, 4 and 2 tokens a side."""
    arguments = {"dims": (32, 64, 128, 256), "depths": (1, 1, 1, 1), "stem": 32, "stem_stride": 1}
    return Astroformer.build("astroformer_nano", pretrained, **arguments | kwargs)


@register_model
def astroformer_0(pretrained: bool = False, **kwargs) -> Astroformer:
    return Astroformer.build("astroformer_0", pretrained, **kwargs)


@register_model
def astroformer_1(pretrained: bool = False, **kwargs) -> Astroformer:
    return Astroformer.build("astroformer_1", pretrained, **{"depths": (1, 5, 13, 1)} | kwargs)


@register_model
def astroformer_2(pretrained: bool = False, **kwargs) -> Astroformer:
    arguments = {"dims": (128, 256, 512, 1024), "depths": (1, 5, 13, 1), "stem": 128}
    return Astroformer.build("astroformer_2", pretrained, **arguments | kwargs)


@register_model
def astroformer_3(pretrained: bool = False, **kwargs) -> Astroformer:
    arguments = {"dims": (192, 384, 768, 1536), "depths": (1, 5, 13, 1), "stem": 192}
    return Astroformer.build("astroformer_3", pretrained, **arguments | kwargs)


@register_model
def astroformer_4(pretrained: bool = False, **kwargs) -> Astroformer:
    arguments = {"dims": (192, 384, 768, 1536), "depths": (1, 11, 27, 1), "stem": 192}
    return Astroformer.build("astroformer_4", pretrained, **arguments | kwargs)


@register_model
def astroformer_5(pretrained: bool = False, **kwargs) -> Astroformer:
    arguments = {"dims": (256, 512, 1280, 2048), "depths": (1, 11, 27, 1), "stem": 192}
    return Astroformer.build("astroformer_5", pretrained, **arguments | kwargs)
