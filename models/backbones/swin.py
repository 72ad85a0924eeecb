"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (Liu et al., ICCV 2021, arXiv:2103.14030).

Written after the paper and the authors' repository, microsoft/Swin-Transformer (MIT); its checkpoints load. timm has
the net too (`swin_tiny_patch4_window7_224`); this one takes any image size and any token mixer. Version 2 is timm's.
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath, LayerNorm2d, Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, init_weights
from models.layers.downsample import PatchMerging, patch_embed
from ops import create_ops, parse_mixers
from ops.registry import Spec


class Block(nn.Module):
    """Token mixing and MLP, each added to the map (B, C, H, W)."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **context) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.mixer(self.norm1(x), **context))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class Swin(HierarchicalBackbone):
    """Args:
    dim: channels of the first stage; each further one has twice as many.
    depths, heads: blocks and attention heads of each stage.
    window: side of a window; checkpoints for 224 pixels have 7, those for 384 pixels 12.
    mixers: token mixers, as `ops.parse_mixers` reads them; by default shifted windows.
    """

    block: type[nn.Module] = Block
    op = "window"
    map_norms = True
    renames = (
        (r"\.attn_mask$", None),
        (r"^layers\.(\d)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
        (r"^layers\.", "stages."),
        (r"^patch_embed\.proj\.", "stages.0.downsample.0."),
        (r"^patch_embed\.norm\.", "stages.0.downsample.1."),
        (r"\.attn\.", ".mixer."),
    )

    def __init__(
        self,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        mixers: Spec | Sequence | None = None,
        patch: int = 4,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        specs = parse_mixers({"name": self.op, "window": window} if mixers is None else mixers, depths)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        dims = [dim * 2**i for i in range(len(depths))]
        strides = [patch * 2**i for i in range(len(depths))]
        stages = []
        for i, width in enumerate(dims):
            downsample = PatchMerging(dims[i - 1], width) if i else patch_embed(in_chans, width, patch, eps=1e-5)
            ops, contexts = create_ops(specs[i], width, heads[i], stage=i, stride=strides[i])
            blocks = [self.block(width, op, rate) for op, rate in zip(ops, rates[i], strict=True)]
            stages.append(Stage(downsample, blocks, contexts))
        super().__init__(stages, dims, strides, LayerNorm2d(dims[-1], eps=1e-5), in_chans=in_chans, **kwargs)
        self.apply(init_weights)


_RELEASES = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
default_cfgs = generate_default_cfgs(
    {
        f"swin_{size}.in1k": imagenet_cfg(f"{_RELEASES}swin_{size}_patch4_window7_224.pth")
        for size in ("tiny", "small", "base")
    }
    | {"swin_nano": imagenet_cfg(input_size=(3, 32, 32), pool_size=(2, 2))}
)


@register_model
def swin_nano(pretrained: bool = False, **kwargs) -> Swin:
    """A size of ours for small images and CPUs; 32 pixels give maps of 16, 8, 4 and 2."""
    small = {"dim": 32, "depths": (2, 2, 2, 2), "heads": (1, 2, 4, 8), "window": 4, "patch": 2}
    return Swin.build("swin_nano", pretrained, **small | kwargs)


@register_model
def swin_tiny(pretrained: bool = False, **kwargs) -> Swin:
    return Swin.build("swin_tiny", pretrained, **kwargs)


@register_model
def swin_small(pretrained: bool = False, **kwargs) -> Swin:
    return Swin.build("swin_small", pretrained, **{"depths": (2, 2, 18, 2)} | kwargs)


@register_model
def swin_base(pretrained: bool = False, **kwargs) -> Swin:
    large = {"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}
    return Swin.build("swin_base", pretrained, **large | kwargs)
