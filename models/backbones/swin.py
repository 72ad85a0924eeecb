"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (Liu et al., ICCV 2021, arXiv:2103.14030).

Written after the paper and the authors' repository, microsoft/Swin-Transformer (MIT); its checkpoints load. timm has
the net too (`swin_tiny_patch4_window7_224`), and version 2; the net here takes any image size and any token mixer.
"""

from collections.abc import Sequence

from timm.layers import DropPath, LayerNorm2d, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, init_weights, stage_layout
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


def shifted_window_blocks(dim: int, num_heads: int, window: int, rates: Sequence[float]) -> nn.Sequential:
    """Return Swin's blocks for maps (B, dim, H, W) outside a backbone; windows are shifted in every second block.

    Args:
        dim: Number of channels.
        num_heads: Number of attention heads.
        window: Side of a window in tokens.
        rates: Drop path rate of each block.
    """
    ops, _ = create_ops([{"name": "window", "window": window}] * len(rates), dim, num_heads)
    return nn.Sequential(*(Block(dim, op, rate) for op, rate in zip(ops, rates, strict=True)))


class Swin(HierarchicalBackbone):
    """Pyramid with shifted window attention.

    A subclass may set another `block` class, built with (dim, mixer, drop_path), and another default `op`.

    Args:
        dim: Number of channels of the first stage; every further stage has twice as many.
        depths: Number of blocks in each stage.
        heads: Number of attention heads in each stage.
        window: Side of a window. Checkpoints for 224 pixels have 7, checkpoints for 384 pixels have 12.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: shifted windows.
        patch: Side of a patch of the stem, in pixels.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
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
        dims, strides, rates = stage_layout(dim, depths, drop_path_rate, patch)
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
    """Return a small net of our own for small images and CPUs; 32 pixels give maps of 16, 8, 4 and 2 tokens a side."""
    arguments = {"dim": 32, "depths": (2, 2, 2, 2), "heads": (1, 2, 4, 8), "window": 4, "patch": 2}
    return Swin.build("swin_nano", pretrained, **arguments | kwargs)


@register_model
def swin_tiny(pretrained: bool = False, **kwargs) -> Swin:
    return Swin.build("swin_tiny", pretrained, **kwargs)


@register_model
def swin_small(pretrained: bool = False, **kwargs) -> Swin:
    return Swin.build("swin_small", pretrained, **{"depths": (2, 2, 18, 2)} | kwargs)


@register_model
def swin_base(pretrained: bool = False, **kwargs) -> Swin:
    arguments = {"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}
    return Swin.build("swin_base", pretrained, **arguments | kwargs)
