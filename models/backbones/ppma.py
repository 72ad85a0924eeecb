"""PPMA: Polyline Path Masked Attention for Vision Transformer (Zhao et al., 2025, arXiv:2506.15940).

Written after the paper and the authors' repository, zhongchenzhao/PPMA (Apache-2.0); its checkpoints load.
"""

import re
from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import DropPath, LayerScale
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, init_weights, stage_layout
from models.layers.conv import conv_bn
from ops import create_ops, parse_mixers
from ops.registry import Spec


class DepthwiseMlp(nn.Module):
    """MLP on (B, H, W, C) that adds a depthwise convolution of the hidden map to the hidden map."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Block(nn.Module):
    """Depthwise convolution (position), token mixing and MLP, each added to the map (B, C, H, W).

    Args:
        dim: Number of channels.
        mixer: Token mixer.
        mlp_ratio: Width of the MLP relative to the channels.
        drop_path: Drop path rate.
        layer_scale: Learn a factor for each channel of what the mixer and the MLP add.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, drop_path: float, layer_scale: bool):
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = DepthwiseMlp(dim, int(mlp_ratio * dim))
        self.scale1, self.scale2 = (LayerScale(dim, 1e-6) if layer_scale else nn.Identity() for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **context) -> Tensor:
        x = (x + self.pos_embed(x)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x), **context)))
        x = x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))
        return x.permute(0, 3, 1, 2)


class ProjectedNorm(nn.BatchNorm2d):
    """Linear map to more channels, batch norm and swish: (B, in_dim, H, W) to (B, dim, H, W)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__(dim)
        self.proj = nn.Linear(in_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))


class PPMA(HierarchicalBackbone):
    """Pyramid with polyline path masked attention.

    Args:
        dims: Number of channels of each stage.
        depths: Number of blocks in each stage.
        heads: Number of attention heads in each stage.
        mlp_ratios: Width of the MLP in each stage, relative to the channels.
        chunk: Number of leading stages with attention along rows and columns. The other stages attend to the whole map.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: polyline path masked attention.
        layer_scale: Number of last stages whose blocks have a learned factor for each channel of what they add.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    renames = (
        (r"^layers\.(\d)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
        (r"\.downsample\.reduction\.", ".downsample.0."),
        (r"\.downsample\.norm\.", ".downsample.1."),
        (r"^layers\.(\d)\.Relpos\.", None),
        (r"^layers\.", "stages."),
        (r"^patch_embed\.proj\.", "stages.0.downsample."),
        (r"\.pos\.conv\.", ".pos_embed."),
        (r"\.retention_layer_norm\.", ".norm1."),
        (r"\.retention\.", ".mixer."),
        (r"\.final_layer_norm\.", ".norm2."),
        (r"\.ffn\.dwconv\.conv\.", ".mlp.dwconv."),
        (r"\.ffn\.", ".mlp."),
        (r"\.gamma_(\d)$", r".scale\1.gamma"),
        (r"^proj\.", "norm.proj."),
    )
    map_norms = True
    # Epsilon of the authors' norms on dense features.
    map_norm_eps = 1e-5

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        heads: Sequence[int] = (4, 4, 8, 16),
        mlp_ratios: Sequence[float] = (3.0, 3.0, 3.0, 3.0),
        chunk: int = 2,
        mixers: Spec | Sequence | None = None,
        layer_scale: int = 0,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        if mixers is None:
            forms = ("chunk" if i < chunk else "whole" for i in range(len(dims)))
            mixers = [{"name": "polyline_path", "form": form} for form in forms]
        specs = parse_mixers(mixers, depths)
        dims, strides, rates = stage_layout(dims, depths, drop_path_rate)
        half, gelu = dims[0] // 2, nn.GELU()
        stem = [*conv_bn(in_chans, half), gelu, *conv_bn(half, half, 1), gelu, *conv_bn(half, dims[0]), gelu]
        stages = []
        for i, dim in enumerate(dims):
            downsample = nn.Sequential(*(conv_bn(dims[i - 1], dim) if i else [*stem, *conv_bn(dim, dim, 1)]))
            ops, contexts = create_ops(specs[i], dim, heads[i], stage=i, stride=strides[i])
            blocks = [
                Block(dim, op, mlp_ratios[i], rate, i >= len(dims) - layer_scale)
                for op, rate in zip(ops, rates[i], strict=True)
            ]
            stages.append(Stage(downsample, blocks, contexts))
        norm = ProjectedNorm(dims[-1], 1024)
        super().__init__(stages, dims, strides, norm, in_chans=in_chans, num_features=1024, **kwargs)
        self.apply(init_weights)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the authors' weights, and flatten their layer scales from (1, 1, 1, C) to (C,)."""
        state = super().checkpoint_filter(state)
        return {key: value.flatten() if re.search(r"scale\d\.gamma$", key) else value for key, value in state.items()}


_CHECKPOINTS = "https://huggingface.co/ZhongchenZhao/PPMA/resolve/main/checkpoints/classification/"
default_cfgs = generate_default_cfgs(
    {
        f"ppma_{size}.in1k": imagenet_cfg(f"{_CHECKPOINTS}PPMA_{run}/best.pth")
        for size, run in {"tiny": "T_202502251000", "small": "S_202504021000", "base": "B_202504101400"}.items()
    }
)


@register_model
def ppma_tiny(pretrained: bool = False, **kwargs) -> PPMA:
    return PPMA.build("ppma_tiny", pretrained, **kwargs)


@register_model
def ppma_small(pretrained: bool = False, **kwargs) -> PPMA:
    arguments = {"depths": (3, 4, 18, 4), "mlp_ratios": (4.0, 4.0, 3.0, 3.0), "chunk": 3}
    return PPMA.build("ppma_small", pretrained, **arguments | kwargs)


@register_model
def ppma_base(pretrained: bool = False, **kwargs) -> PPMA:
    arguments = {
        "dims": (80, 160, 320, 512),
        "depths": (4, 8, 25, 8),
        "heads": (5, 5, 10, 16),
        "mlp_ratios": (4.0, 4.0, 3.0, 3.0),
        "chunk": 3,
        "layer_scale": 2,
    }
    return PPMA.build("ppma_base", pretrained, **arguments | kwargs)
