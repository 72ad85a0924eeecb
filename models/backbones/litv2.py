"""LITv2: Fast Vision Transformers with HiLo Attention (Pan et al., NeurIPS 2022, arXiv:2205.13213).

Written after the paper and the authors' repository, ziplab/LITv2 (Apache-2.0); its checkpoints load. The authors
train the layers called `offset` with a hundredth of the learning rate.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula
from torchvision.ops import deform_conv2d

from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, init_weights, stage_layout
from models.layers.downsample import patch_embed
from models.layers.pvt_v2 import DepthwiseMlp
from ops import create_ops, parse_mixers
from ops.registry import Spec


class Block(nn.Module):
    """Token mixing and MLP, each added to the map (B, C, H, W); without a mixer only the MLP."""

    def __init__(self, dim: int, mixer: nn.Module | None, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim) if mixer is not None else nn.Identity()
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = DepthwiseMlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **context) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if self.mixer is not None:
            x = x + self.drop_path(self.mixer(self.norm1(x), **context))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class DeformableMerging(nn.Conv2d):
    """2 x 2 convolution with stride 2 whose four samples are each moved by a learned offset (Dai et al., ICCV 2017).

    It maps (B, C, H, W) to (B, dim, ⌈H / 2⌉, ⌈W / 2⌉).

    Args:
        in_dim: Number of channels C of the input.
        dim: Number of channels of the output.
        crop_odd: Drop the last row or column of a map of odd side: the output is (B, dim, ⌊H / 2⌋, ⌊W / 2⌋). Otherwise
            zeros pad the map.
    """

    bias: nn.Parameter

    def __init__(self, in_dim: int, dim: int, crop_odd: bool):
        super().__init__(in_dim, dim, 2, stride=2)
        self.crop_odd = crop_odd
        # For each of the four samples one channel for rows and one for columns.
        self.offset = nn.Conv2d(in_dim, 8, 2, stride=2)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        if not self.crop_odd:
            x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        # torchvision's kernels for the CPU do not support bfloat16.
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, offset, weight, bias = (t.to(dtype) for t in (x, self.offset(x), self.weight, self.bias))
        return deform_conv2d(x, offset, weight, bias, stride=(2, 2)).to(self.weight.dtype)


@register_flop_formula(torch.ops.torchvision.deform_conv2d)
def deform_conv2d_flops(x_shape, weight_shape, offset_shape, *args, out_shape, **kwargs) -> int:
    """Return the FLOPs of a convolution; the interpolation of the samples is not counted."""
    return 2 * out_shape.numel() * weight_shape[1:].numel()


class LITv2(HierarchicalBackbone):
    """Pyramid of two stages without attention, one with HiLo attention and one with full attention.

    Args:
        dim: Number of channels of the first stage; every further stage has twice as many.
        depths: Number of blocks in each stage.
        heads: Number of attention heads in each stage.
        window: Side of HiLo's windows in the third stage. The paper's detectors have 2 or 4.
        mixers: Token mixers, as `ops.parse_mixers` reads them, with two differences: a single mixer is that of the last
            two stages, and an entry None is a stage without attention. Default: as above.
        crop_odd: Drop the last row or column of a map of odd side before downsampling, as the authors' dense code does.
            By default zeros pad the map.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    map_norms = True
    renames = (
        (r"^patch_embed\.proj\.", "stages.0.downsample.0."),
        (r"^patch_embed\.norm\.", "stages.0.downsample.1."),
        (r"^layers\.(\d)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
        (r"^layers\.", "stages."),
        (r"\.dconv\.conv_offset\.", ".0.offset."),
        (r"\.dconv\.", ".0."),
        (r"\.norm_layer\.", ".1."),
        (r"\.attn\.", ".mixer."),
    )

    def __init__(
        self,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 2,
        mixers: Spec | Sequence | None = None,
        crop_odd: bool = False,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        if mixers is None:
            mixers = [None, None, {"name": "hilo", "window": window}, {"name": "hilo", "window": 1}]
        elif isinstance(mixers, (str, Mapping)):
            mixers = [None, None, mixers, mixers]
        # The mixers of stages without attention are parsed too, since each stage needs an entry, but not built.
        specs = parse_mixers(["hilo" if entry is None else entry for entry in mixers], depths)
        dims, strides, rates = stage_layout(dim, depths, drop_path_rate)
        stages = []
        for i, width in enumerate(dims):
            if i:
                merging = DeformableMerging(dims[i - 1], width, crop_odd)
                downsample = nn.Sequential(merging, nn.BatchNorm2d(width), nn.GELU())
            else:
                downsample = patch_embed(in_chans, width, eps=1e-5)
            ops, contexts = [None] * depths[i], []
            if mixers[i] is not None:
                ops, contexts = create_ops(specs[i], width, heads[i], stage=i, stride=strides[i])
            blocks = [Block(width, op, rate) for op, rate in zip(ops, rates[i], strict=True)]
            stages.append(Stage(downsample, blocks, contexts))
        super().__init__(stages, dims, strides, LayerNorm2d(dims[-1], eps=1e-5), in_chans=in_chans, **kwargs)
        self.apply(init_weights)


_RELEASES = "https://github.com/ziplab/LITv2/releases/download/v1.0/litv2_"
default_cfgs = generate_default_cfgs(
    {f"litv2_{size}.in1k": imagenet_cfg(f"{_RELEASES}{size[0]}.pth") for size in ("small", "medium", "base")}
    | {
        "litv2_base.in1k_384": imagenet_cfg(
            f"{_RELEASES}b_384.pth", input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0
        )
    }
)


@register_model
def litv2_small(pretrained: bool = False, **kwargs) -> LITv2:
    return LITv2.build("litv2_small", pretrained, **kwargs)


@register_model
def litv2_medium(pretrained: bool = False, **kwargs) -> LITv2:
    return LITv2.build("litv2_medium", pretrained, **{"depths": (2, 2, 18, 2)} | kwargs)


@register_model
def litv2_base(pretrained: bool = False, **kwargs) -> LITv2:
    arguments = {"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}
    return LITv2.build("litv2_base", pretrained, **arguments | kwargs)
