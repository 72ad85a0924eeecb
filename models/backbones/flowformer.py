"""Flowformer: Linearizing Transformers with Conservation Flows (Wu et al., ICML 2022, arXiv:2202.06258).

The net for images. Written after the paper and the authors' repository, thuml/Flowformer (MIT); its checkpoints load.
"""

from collections.abc import Sequence

import torch
from timm.layers import DropPath, LayerNorm2d, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.backbones.pvt import PatchEmbed
from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, init_weights, stage_layout
from models.layers.downsample import PatchConv2d
from models.layers.position import grid_of
from ops import create_ops, parse_mixers
from ops.registry import Spec


class Block(nn.Module):
    """Token mixing and MLP, each added to the map (B, C, H, W); only the MLP's output has a layer scale."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **context) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.mixer(self.norm1(x), **context))
        x = x + self.drop_path(self.gamma * self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class Flowformer(HierarchicalBackbone):
    """Pyramid with flow attention, and learned positions in the first stage.

    Args:
        dims: Number of channels of each stage.
        depths: Number of blocks in each stage.
        heads: Number of attention heads in each stage.
        mixers: Token mixers, as `ops.parse_mixers` reads them.
        img_size: Side or (height, width) in pixels of the images that the positions are learned for.
        patch: Side of a patch of the stem, in pixels.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    renames = (
        (r"^patch_embed\.0\.", "stages.0.downsample."),
        (r"^patch_embed\.(\d)\.proj\.", r"stages.\1.downsample."),
        (r"^pos_embed$", "stages.0.downsample.pos_embed"),
        (r"^blocks\.(\d)\.", r"stages.\1.blocks."),
        (r"\.attn\.", ".mixer."),
    )

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 10, 3),
        heads: Sequence[int] = (12, 12, 12, 12),
        mixers: Spec | Sequence = "flow",
        img_size: int | tuple[int, int] = 224,
        patch: int = 4,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        specs = parse_mixers(mixers, depths)
        dims, strides, rates = stage_layout(dims, depths, drop_path_rate, patch)
        stem = PatchEmbed(PatchConv2d(in_chans, dims[0], patch), nn.Identity(), dims[0], grid_of(img_size, patch))
        stages = []
        for i, dim in enumerate(dims):
            ops, contexts = create_ops(specs[i], dim, heads[i], stage=i, stride=strides[i])
            blocks = [Block(dim, op, rate) for op, rate in zip(ops, rates[i], strict=True)]
            stages.append(Stage(PatchConv2d(dims[i - 1], dim, 2) if i else stem, blocks, contexts))
        super().__init__(stages, dims, strides, LayerNorm2d(dims[-1], eps=1e-6), in_chans=in_chans, **kwargs)
        self.apply(init_weights)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"stages.0.downsample.pos_embed"}


_STEM = {"first_conv": "stages.0.downsample.proj", "fixed_input_size": True}
default_cfgs = generate_default_cfgs(
    {
        "flowformer_nano": imagenet_cfg(input_size=(3, 32, 32), pool_size=(2, 2), **_STEM),
        "flowformer_base": imagenet_cfg(**_STEM),
    }
)


@register_model
def flowformer_nano(pretrained: bool = False, **kwargs) -> Flowformer:
    """Return a small net of our own for small images and CPUs; 32 pixels give maps of 16, 8, 4 and 2 tokens a side."""
    dims, depths, heads = (32, 64, 128, 256), (2, 2, 2, 2), (4, 4, 4, 4)
    arguments = {"dims": dims, "depths": depths, "heads": heads, "patch": 2, "img_size": 32}
    return Flowformer.build("flowformer_nano", pretrained, **arguments | kwargs)


@register_model
def flowformer_base(pretrained: bool = False, **kwargs) -> Flowformer:
    """Return the paper's net of 19 blocks."""
    return Flowformer.build("flowformer_base", pretrained, **kwargs)
