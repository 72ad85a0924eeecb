"""PATNet: Partial Convolution Meets Visual Attention (Huang et al., arXiv:2503.03148).

Written after the paper and the authors' repository, haiduo/PartialNet (MIT), which calls the nets PartialNet; its
checkpoints load. The layout is that of FasterNet (arXiv:2303.03667).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, SelectAdaptivePool2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, init_linear_and_conv, stage_layout
from models.layers.downsample import PatchConv2d
from ops import create_ops, parse_mixers
from ops.registry import Spec


class PartialSpatialAttention(nn.Module):
    """Half of the channels (B, C, H, W) are multiplied by a gate of each token, and the others are mixed linearly."""

    def __init__(self, dim: int):
        super().__init__()
        self.widths = (dim - dim // 2, dim // 2)
        gated, mixed = self.widths
        self.conv_attn = nn.Conv2d(gated, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(gated)
        self.norm2 = nn.BatchNorm2d(mixed)
        self.conv = nn.Conv2d(mixed, mixed, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gated, mixed = x.split(self.widths, dim=1)
        gated = self.norm(gated * F.hardsigmoid(self.conv_attn(gated)))
        return torch.cat([gated, self.conv(self.norm2(mixed))], dim=1)


class Block(nn.Module):
    """Token mixing and a channel MLP of the map (B, C, H, W), with one residual connection together or one each.

    Args:
        dim: Channels C.
        mixer: Op from (B, H, W, C) to the same shape.
        act: Class of the activation.
        spatial: Whether partial spatial attention follows the MLP.
        split: Whether mixer and MLP have a residual connection each.
        drop_path: Drop path rate of the MLP.
    """

    def __init__(self, dim: int, mixer: nn.Module, act: type[nn.Module], spatial: bool, split: bool, drop_path: float):
        super().__init__()
        self.split = split
        self.mixer = mixer
        layers = [nn.Conv2d(dim, 2 * dim, 1, bias=False), nn.BatchNorm2d(2 * dim), act()]
        layers += [nn.Conv2d(2 * dim, dim, 1, bias=False), *([PartialSpatialAttention(dim)] if spatial else [])]
        self.ffn = nn.Sequential(*layers)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **context) -> Tensor:
        mixed = self.mixer(x.permute(0, 2, 3, 1), **context).permute(0, 3, 1, 2)
        if self.split:
            x = mixed = x + mixed
        return x + self.drop_path(self.ffn(mixed))


class PATNet(HierarchicalBackbone):
    """Pyramid with partial convolutions and partial visual attention.

    Args:
        dim: Number of channels of the first stage; every further stage has twice as many.
        depths: Number of blocks in each stage.
        heads: Number of attention heads in each stage; by default only the last stage has any.
        act: Activation, "relu" or "gelu".
        spatial: Add partial spatial attention after the MLPs.
        pre_head: Channels of the layer between the pooled map and the classifier.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: partial visual attention with batch norms.
        patch: Side of a patch of the stem, in pixels.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    map_norms = True
    map_norm = nn.BatchNorm2d
    renames = (
        (r"^patch_embed\.proj\.", "stages.0.downsample.0."),
        (r"^patch_embed\.norm\.", "stages.0.downsample.1."),
        (r"^stages\.([135])\.reduction\.", lambda match: f"stages.{int(match[1]) // 2 + 1}.downsample.0."),
        (r"^stages\.([135])\.norm\.", lambda match: f"stages.{int(match[1]) // 2 + 1}.downsample.1."),
        (r"^stages\.(\d)(\.blocks\.\d+)\.spatial_mixing\.", lambda m: f"stages.{int(m[1]) // 2}{m[2]}.mixer."),
        (r"^stages\.(\d)(\.blocks\.\d+)\.mlp\.", lambda m: f"stages.{int(m[1]) // 2}{m[2]}.ffn."),
        (r"^avgpool_pre_head\.1\.", "pre_head."),
    )

    def __init__(
        self,
        dim: int = 64,
        depths: Sequence[int] = (2, 2, 6, 4),
        heads: Sequence[int] = (4, 4, 4, 4),
        act: str = "relu",
        spatial: bool = False,
        pre_head: int = 1280,
        mixers: Spec | Sequence | None = None,
        patch: int = 4,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        if act not in ("relu", "gelu"):
            raise ValueError(f"act must be 'relu' or 'gelu', not {act!r}")
        layer: Any = nn.ReLU if act == "relu" else nn.GELU
        default = {"name": "partial_visual", "batch_norm": True, "dropout": 0.1}
        specs = parse_mixers(default if mixers is None else mixers, depths)
        dims, strides, rates = stage_layout(dim, depths, drop_path_rate, patch)
        stages = []
        for i, width in enumerate(dims):
            conv = PatchConv2d(dims[i - 1] if i else in_chans, width, 2 if i else patch, bias=False)
            ops, contexts = create_ops(specs[i], width, heads[i], stage=i, stride=strides[i])
            split = i == len(dims) - 1
            blocks = [Block(width, op, layer, spatial, split, rate) for op, rate in zip(ops, rates[i], strict=True)]
            stages.append(Stage(nn.Sequential(conv, nn.BatchNorm2d(width)), blocks, contexts))
        super().__init__(stages, dims, strides, nn.Identity(), in_chans=in_chans, num_features=pre_head, **kwargs)
        self.pre_head = nn.Linear(dims[-1], pre_head, bias=False)
        self.act = layer()
        self.apply(init_linear_and_conv)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.pre_head = nn.Identity()
        return take

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if not cast(SelectAdaptivePool2d, self.global_pool).is_identity():
            x = self.act(self.pre_head(self.global_pool(x)))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)


_cfg = partial(imagenet_cfg, crop_pct=0.9, first_conv="stages.0.downsample.0")
default_cfgs = generate_default_cfgs(
    {"patnet_nano": _cfg(input_size=(3, 32, 32), pool_size=(2, 2))}
    | {f"patnet_{size}": _cfg() for size in ("t0", "t1", "t2", "s", "m", "l")}
)


@register_model
def patnet_nano(pretrained: bool = False, **kwargs) -> PATNet:
    """Return a small net of our own for small images and CPUs; 32 pixels give maps of 16, 8, 4 and 2 tokens a side."""
    arguments = {"dim": 32, "depths": (1, 1, 2, 2), "act": "gelu", "pre_head": 256, "patch": 2}
    return PATNet.build("patnet_nano", pretrained, **arguments | kwargs)


@register_model
def patnet_t0(pretrained: bool = False, **kwargs) -> PATNet:
    return PATNet.build("patnet_t0", pretrained, **{"dim": 32, "depths": (1, 2, 8, 2), "act": "gelu"} | kwargs)


@register_model
def patnet_t1(pretrained: bool = False, **kwargs) -> PATNet:
    arguments = {"dim": 48, "depths": (1, 2, 8, 2), "act": "gelu", "spatial": True}
    return PATNet.build("patnet_t1", pretrained, **arguments | kwargs)


@register_model
def patnet_t2(pretrained: bool = False, **kwargs) -> PATNet:
    return PATNet.build("patnet_t2", pretrained, **kwargs)


@register_model
def patnet_s(pretrained: bool = False, **kwargs) -> PATNet:
    return PATNet.build("patnet_s", pretrained, **{"dim": 96, "depths": (2, 2, 9, 4)} | kwargs)


@register_model
def patnet_m(pretrained: bool = False, **kwargs) -> PATNet:
    return PATNet.build("patnet_m", pretrained, **{"dim": 128, "depths": (2, 3, 16, 4)} | kwargs)


@register_model
def patnet_l(pretrained: bool = False, **kwargs) -> PATNet:
    return PATNet.build("patnet_l", pretrained, **{"dim": 160, "depths": (2, 3, 20, 4)} | kwargs)
