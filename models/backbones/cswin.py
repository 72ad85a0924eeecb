"""CSWin Transformer (Dong et al., CVPR 2022, arXiv:2107.00652).

Paper: CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows. Written after the paper and
the authors' repository, microsoft/CSWin-Transformer (MIT); its checkpoints load. The authors' classifier attends to the
whole map in every stage whose map is as wide as the strips. Here, as in the authors' dense code, only the last stage
does so.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.backbones.swin import Block
from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, init_weights, stage_layout
from ops import create_ops, parse_mixers
from ops.registry import Spec
from retinue.utils.arithmetic import padding


class StemConv2d(nn.Conv2d):
    """Convolution of overlapping patches with stride 4: (B, C, H, W) to (B, dim, ⌈H / 4⌉, ⌈W / 4⌉)."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__(in_chans, dim, 7, stride=4, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, padding(x.shape[3], 4), 0, padding(x.shape[2], 4))))


class CSWin(HierarchicalBackbone):
    """Pyramid with cross-shaped window attention.

    Args:
        dim: Number of channels of the first stage; every further stage has twice as many.
        depths: Number of blocks in each stage.
        heads: Number of attention heads in each stage.
        splits: Width of the strips in each stage, in tokens; 0 is the whole map. In checkpoints for 384 pixels the
            third is 12.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: cross-shaped windows.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    block: type[nn.Module] = Block
    map_norms = True
    renames = (
        (r"^stage1_conv_embed\.0\.", "stages.0.downsample.0."),
        (r"^stage1_conv_embed\.2\.", "stages.0.downsample.1."),
        (r"^merge(\d)\.conv\.", r"stages.\1.downsample.0."),
        (r"^merge(\d)\.norm\.", r"stages.\1.downsample.1."),
        (r"^stage(\d)\.(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks.{match[2]}."),
        (r"(blocks\.\d+)\.(qkv|proj|attns)\.", r"\1.mixer.\2."),
    )

    def __init__(
        self,
        dim: int = 64,
        depths: Sequence[int] = (1, 2, 21, 1),
        heads: Sequence[int] = (2, 4, 8, 16),
        splits: Sequence[int] = (1, 2, 7, 0),
        mixers: Spec | Sequence | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        if mixers is None:
            mixers = [{"name": "cross_shaped_window", "split": split} for split in splits]
        specs = parse_mixers(mixers, depths)
        dims, strides, rates = stage_layout(dim, depths, drop_path_rate)
        stages = []
        for i, width in enumerate(dims):
            conv = nn.Conv2d(dims[i - 1], width, 3, stride=2, padding=1) if i else StemConv2d(in_chans, width)
            ops, contexts = create_ops(specs[i], width, heads[i], stage=i, stride=strides[i])
            blocks = [self.block(width, op, rate) for op, rate in zip(ops, rates[i], strict=True)]
            stages.append(Stage(nn.Sequential(conv, LayerNorm2d(width, eps=1e-5)), blocks, contexts))
        super().__init__(stages, dims, strides, LayerNorm2d(dims[-1], eps=1e-5), in_chans=in_chans, **kwargs)
        self.apply(init_weights)


_RELEASES = "https://github.com/microsoft/CSWin-Transformer/releases/download/v0.1.0/cswin_"
default_cfgs = generate_default_cfgs(
    {
        f"cswin_{size}.in1k": imagenet_cfg(f"{_RELEASES}{size}_224.pth", crop_pct=0.9)
        for size in ("tiny", "small", "base")
    }
    | {
        "cswin_large.in22k_in1k": imagenet_cfg(f"{_RELEASES}large_224.pth", crop_pct=0.9),
        "cswin_large.in22k": imagenet_cfg(f"{_RELEASES}large_22k_224.pth", crop_pct=0.9, num_classes=21841),
    }
)


@register_model
def cswin_tiny(pretrained: bool = False, **kwargs) -> CSWin:
    return CSWin.build("cswin_tiny", pretrained, **kwargs)


@register_model
def cswin_small(pretrained: bool = False, **kwargs) -> CSWin:
    return CSWin.build("cswin_small", pretrained, **{"depths": (2, 4, 32, 2)} | kwargs)


@register_model
def cswin_base(pretrained: bool = False, **kwargs) -> CSWin:
    arguments = {"dim": 96, "depths": (2, 4, 32, 2), "heads": (4, 8, 16, 32)}
    return CSWin.build("cswin_base", pretrained, **arguments | kwargs)


@register_model
def cswin_large(pretrained: bool = False, **kwargs) -> CSWin:
    arguments = {"dim": 144, "depths": (2, 4, 32, 2), "heads": (6, 12, 24, 24)}
    return CSWin.build("cswin_large", pretrained, **arguments | kwargs)
