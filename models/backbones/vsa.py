"""ViTAEv2 and Swin with varied-size window attention, VSA (Zhang et al., ECCV 2022, arXiv:2204.08446).

ViTAEv2 (Zhang et al., IJCV 2023, arXiv:2202.10108) is written after the papers and what the authors' repository,
ViTAE-Transformer/ViTAE-VSA, computes. The repository names no licence, so none of its code is here; its checkpoints
load. Swin with VSA is written after the paper; its weights were never released.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.backbones import swin
from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, init_weights, stage_layout
from ops import create_op, create_ops, parse_mixers
from ops.registry import Place, Spec
from retinue.utils.arithmetic import padding


class NormalCell(nn.Module):
    """Token mixing and, in parallel, convolutions of the same map; then MLP. Maps are (B, C, H, W).

    Args:
        dim: Number of channels.
        mixer: Token mixer; a depthwise convolution adds position to its input.
        groups: Number of groups of the convolutions.
        drop_path: Drop path rate.
    """

    def __init__(self, dim: int, mixer: nn.Module, groups: int, drop_path: float):
        super().__init__()
        self.pos = position(dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.pcm = convolutions((dim, 4 * dim, dim, dim), groups)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim).apply(init_weights)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **context) -> Tensor:
        mixed = self.mixer(self.norm1((x + self.pos(x)).permute(0, 2, 3, 1)), **context)
        x = (x + self.drop_path(self.pcm(x))).permute(0, 2, 3, 1) + self.drop_path(mixed)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class ReductionCell(nn.Module):
    """Reduction of the resolution: (B, C, H, W) to (B, dim, ⌈H / stride⌉, ⌈W / stride⌉).

    Parallel dilated convolutions reduce the map, and the mixer reads their concatenated outputs. In parallel, strided
    convolutions reduce the same map. The sum of both goes through an MLP.

    Args:
        in_dim: Number of channels C of the input.
        branch_dim: Number of channels of each dilated convolution.
        dim: Number of channels of the output.
        mixer: Token mixer from `branch_dim * len(dilations)` channels to `dim`.
        stride: Stride relative to the input.
        dilations: Dilation of each of the parallel convolutions.
        groups: Number of groups of the strided convolutions.
        wide: Give the strided convolutions 2 * dim hidden channels instead of `branch_dim`.
    """

    def __init__(
        self,
        in_dim: int,
        branch_dim: int,
        dim: int,
        mixer: nn.Module,
        stride: int,
        dilations: Sequence[int],
        groups: int,
        wide: bool,
    ):
        super().__init__()
        self.stride = stride
        kernel, width = 2 * stride - 1, branch_dim * len(dilations)
        self.prm = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(in_dim, branch_dim, kernel, stride, math.ceil(((kernel - 1) * d + 1 - stride) / 2), d),
                nn.GELU(),
            )
            for d in dilations
        )
        self.pos = position(width)
        self.norm1 = nn.LayerNorm(width)
        self.mixer = mixer
        hidden = 2 * dim if wide else branch_dim
        self.pcm = convolutions((in_dim, hidden, hidden, dim), groups, stride)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim).apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, padding(x.shape[3], self.stride), 0, padding(x.shape[2], self.stride)))
        scales = torch.cat([branch(x) for branch in self.prm], dim=1)
        mixed = self.mixer(self.norm1((scales + self.pos(scales)).permute(0, 2, 3, 1)))
        x = mixed + self.pcm(x).permute(0, 2, 3, 1)
        x = x + self.mlp(self.norm2(x))
        return x.permute(0, 3, 1, 2)


def position(dim: int) -> nn.Module:
    """Return the depthwise convolution whose output is added to the tokens as their position."""
    return nn.Conv2d(dim, dim, 7, padding=3, groups=dim)


def convolutions(dims: Sequence[int], groups: int, stride: int = 1) -> nn.Module:
    """Return three 3 x 3 convolutions from dims[0] to dims[3] channels; the leading ones reduce the map by `stride`."""
    layers = []
    for i in range(3):
        step = 2 if stride >> (i + 1) else 1
        layers += [nn.Conv2d(dims[i], dims[i + 1], 3, step, 1, groups=groups), nn.BatchNorm2d(dims[i + 1]), nn.SiLU()]
    return nn.Sequential(*layers[:-2])


class ViTAEv2(HierarchicalBackbone):
    """Pyramid whose stages are a reduction cell and normal cells, without a norm before the classifier.

    Args:
        dim: Number of channels of the first stage; every further stage has twice as many.
        depths: Number of normal cells in each stage.
        heads: Number of attention heads of the normal cells in each stage.
        reduction_heads: Number of attention heads of each stage's reduction cell.
        wide: Give the convolutions of the reduction cells more channels.
        window: Side of a window.
        mixers: Token mixers of the normal cells, as `ops.parse_mixers` reads them. Default: varied-size windows, which
            the reduction cells always have.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate; the rates rise linearly from 0 within stages, as in the authors' code.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    decays_tables = True
    renames = (
        (r"^layers\.(\d)\.RC\.", r"stages.\1.downsample."),
        (r"^layers\.(\d)\.NC\.", r"stages.\1.blocks."),
        (r"\.PRM\.convs\.", ".prm."),
        (r"\.PCM\.", ".pcm."),
        (r"\.attn\.", ".mixer."),
    )

    def __init__(
        self,
        dim: int = 64,
        depths: Sequence[int] = (2, 2, 8, 2),
        heads: Sequence[int] = (2, 4, 8, 16),
        reduction_heads: Sequence[int] = (2, 4, 8, 16),
        wide: bool = True,
        window: int = 7,
        mixers: Spec | Sequence | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        varied = {"name": "varied_size_window", "window": window}
        specs = parse_mixers(varied if mixers is None else mixers, depths)
        dims, strides, _ = stage_layout(dim, depths, drop_path_rate)
        # In the authors' code a stage takes its rates after as many as the stage before it has blocks.
        rates: Any = calculate_drop_path_rates(drop_path_rate, sum(depths))
        dilations = ((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2))
        stages = []
        for i, width in enumerate(dims):
            in_dim = dims[i - 1] if i else in_chans
            branch_dim = dims[i - 1] if i else dim
            place = Place(i, 0, depths[i], strides[i])
            op = create_op(varied, branch_dim * len(dilations[i]), reduction_heads[i], place=place, out_dim=width)
            reduction = ReductionCell(
                in_dim, branch_dim, width, op, 2 if i else 4, dilations[i], (1, 16, 32, 64)[i], wide
            )
            ops, contexts = create_ops(specs[i], width, heads[i], stage=i, stride=strides[i])
            groups = (1, 32, 64, 128)[i]
            first = depths[i - 1] if i else 0
            cells = [NormalCell(width, op, groups, rates[first + j]) for j, op in enumerate(ops)]
            stages.append(Stage(reduction, cells, contexts))
        super().__init__(stages, dims, strides, nn.Identity(), in_chans=in_chans, **kwargs)


class SwinVSABlock(swin.Block):
    """Swin's block with a depthwise convolution for position, added to the map first."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float):
        super().__init__(dim, mixer, drop_path)
        self.pos = position(dim)

    def forward(self, x: Tensor, **context) -> Tensor:
        return super().forward(x + self.pos(x), **context)


class SwinVSA(swin.Swin):
    """Swin with windows of varied sizes, which are not shifted."""

    block, op = SwinVSABlock, "varied_size_window"


_ONEDRIVE_SHARES = {
    "vitaev2_vsa_s": "s!AimBgYV7JjTlgcgB0Xlyc3U4WO11AQ",
    "vitaev2_vsa_widepcm_48m": "s!AimBgYV7JjTlgcgCOt1UwhNQRfO0bw",
}


def _cfg(name: str) -> Any:
    """Return the `default_cfgs` entry of a net, with an address where the authors released its weights."""
    share = _ONEDRIVE_SHARES.get(name)
    url = (f"https://api.onedrive.com/v1.0/shares/{share}/root/content", f"{name}.pth") if share else ""
    convs = (*(f"prm.{i}.0" for i in range(4)), "pcm.0")
    return imagenet_cfg(url, crop_pct=0.9, first_conv=tuple(f"stages.0.downsample.{conv}" for conv in convs))


default_cfgs = generate_default_cfgs(
    {f"vitaev2_vsa_{size}.in1k": _cfg(f"vitaev2_vsa_{size}") for size in ("s", "widepcm_s", "widepcm_48m", "widepcm_b")}
    | {"swin_vsa_tiny": imagenet_cfg(), "swin_vsa_small": imagenet_cfg()}
)


@register_model
def vitaev2_vsa_s(pretrained: bool = False, **kwargs) -> ViTAEv2:
    """Build ViTAEv2-S of the paper, with fewer heads in the reduction cells."""
    arguments = {"wide": False, "reduction_heads": (2, 2, 4, 8)}
    return ViTAEv2.build("vitaev2_vsa_s", pretrained, **arguments | kwargs)


@register_model
def vitaev2_vsa_widepcm_s(pretrained: bool = False, **kwargs) -> ViTAEv2:
    return ViTAEv2.build("vitaev2_vsa_widepcm_s", pretrained, **kwargs)


@register_model
def vitaev2_vsa_widepcm_48m(pretrained: bool = False, **kwargs) -> ViTAEv2:
    heads = (3, 6, 12, 24)
    arguments = {"dim": 96, "depths": (2, 2, 11, 2), "heads": heads, "reduction_heads": heads}
    return ViTAEv2.build("vitaev2_vsa_widepcm_48m", pretrained, **arguments | kwargs)


@register_model
def vitaev2_vsa_widepcm_b(pretrained: bool = False, **kwargs) -> ViTAEv2:
    heads = (4, 8, 16, 32)
    arguments = {"dim": 128, "depths": (2, 2, 12, 2), "heads": heads, "reduction_heads": heads}
    return ViTAEv2.build("vitaev2_vsa_widepcm_b", pretrained, **arguments | kwargs)


@register_model
def swin_vsa_tiny(pretrained: bool = False, **kwargs) -> SwinVSA:
    return SwinVSA.build("swin_vsa_tiny", pretrained, **kwargs)


@register_model
def swin_vsa_small(pretrained: bool = False, **kwargs) -> SwinVSA:
    return SwinVSA.build("swin_vsa_small", pretrained, **{"depths": (2, 2, 18, 2)} | kwargs)
