"""GC ViT: Global Context Vision Transformers (Hatamizadeh et al., ICML 2023, arXiv:2206.09959).

Written after the paper and timm (Apache-2.0). The licence of the authors' code, NVlabs/GCVit, forbids commercial use,
so none of that code is here, only facts: how the authors' nets are built, and how their detectors pad maps. The
authors' checkpoints (CC BY-NC-SA 4.0) load. timm has five of the nets too (`gcvit_tiny`); the nets here (`gc_vit_tiny`)
take any image size and any token mixer.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import DropPath, LayerNorm2d, LayerScale, Mlp, trunc_normal_
from timm.layers.squeeze_excite import SEModule
from timm.models import generate_default_cfgs, register_model
from timm.models.gcvit import Downsample2d
from torch import Tensor, nn

from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, init_weights, stage_layout
from ops import create_ops, parse_mixers
from ops.attention.global_query import WINDOWS
from ops.registry import Spec


class Block(nn.Module):
    """Token mixing and MLP, each added to the map (B, C, H, W).

    Args:
        dim: Number of channels.
        mixer: Token mixer.
        mlp_ratio: Width of the MLP relative to the channels.
        drop_path: Drop path rate.
        layer_scale: Initial factor, learned for each channel, on what is added; None leaves it out.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, drop_path: float, layer_scale: float | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **context) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.ls1(self.mixer(self.norm1(x), **context)))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return x.permute(0, 3, 1, 2)


class GCViT(HierarchicalBackbone):
    """Pyramid whose blocks alternate between windows with local queries and windows with global queries.

    As in the authors' detection code, zeros pad every map to whole windows, even a map smaller than one window.

    Args:
        dim: Number of channels of the first stage; every further stage has twice as many.
        depths: Number of blocks in each stage.
        heads: Number of attention heads in each stage.
        mlp_ratio: Width of the MLP relative to the channels.
        window: Side of a window in all stages, or a list with one side per stage. Checkpoints for 224 pixels have the
            default, checkpoints for 384 pixels (12, 12, 24, 12) and checkpoints for 512 pixels (16, 16, 32, 16). The
            authors' detectors have 24.
        poolings: Number of poolings between each stage's map and its global query. The authors' detectors have
            (3, 2, 1, 0).
        layer_scale: Initial factor, learned for each channel, on what a block adds; None leaves it out.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: as above.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    map_norms = True
    decays_tables = True
    renames = (
        (r"^levels\.(\d)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
        (r"^levels\.", "stages."),
        (r"^patch_embed\.proj\.", "stages.0.downsample.0."),
        (r"^patch_embed\.conv_down\.", "stages.0.downsample.1."),
        (
            r"\.q_global_gen\.to_q_global\.(\d)\.",
            lambda match: f".contexts.0.features.blocks.conv{int(match[1]) + 1}.",
        ),
        (r"(\.downsample(?:\.1)?)\.conv\.", r"\1.conv_block.conv."),
        (r"\.conv\.0\.", ".conv_dw."),
        (r"\.conv\.2\.fc\.0\.", ".se.fc1."),
        (r"\.conv\.2\.fc\.2\.", ".se.fc2."),
        (r"\.conv\.3\.", ".conv_pw."),
        (r"\.attn\.", ".mixer."),
        (r"\.gamma([12])$", r".ls\1.gamma"),
    )

    def __init__(
        self,
        dim: int = 64,
        depths: Sequence[int] = (3, 4, 19, 5),
        heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        window: int | Sequence[int] = WINDOWS,
        poolings: Sequence[int] = (3, 2, 0, 0),
        layer_scale: float | None = None,
        mixers: Spec | Sequence | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        if mixers is None:
            windows = [window] * len(depths) if isinstance(window, int) else window
            mixers = [
                {"name": "global_query", "window": side, "poolings": number, "shrink": False}
                for side, number in zip(windows, poolings, strict=True)
            ]
        specs = parse_mixers(mixers, depths)
        dims, strides, rates = stage_layout(dim, depths, drop_path_rate)
        norm: Any = partial(LayerNorm2d, eps=1e-5)
        stem = nn.Sequential(nn.Conv2d(in_chans, dim, 3, stride=2, padding=1), Downsample2d(dim, norm_layer=norm))
        stages = []
        for i, width in enumerate(dims):
            downsample = Downsample2d(dims[i - 1], width, norm_layer=norm) if i else stem
            ops, contexts = create_ops(specs[i], width, heads[i], stage=i, stride=strides[i])
            blocks = [Block(width, op, mlp_ratio, rate, layer_scale) for op, rate in zip(ops, rates[i], strict=True)]
            stages.append(Stage(downsample, blocks, contexts))
        super().__init__(stages, dims, strides, norm(dims[-1]), in_chans=in_chans, **kwargs)
        self.apply(init_weights)
        for module in self.modules():
            # The authors' squeeze-and-excitation has linear layers in place of convolutions.
            if isinstance(module, SEModule):
                trunc_normal_(module.fc1.weight, std=0.02)
                trunc_normal_(module.fc2.weight, std=0.02)


_RELEASES = "https://huggingface.co/nvidia/GCViT/resolve/main/gcvit_"
default_cfgs = generate_default_cfgs(
    {
        f"gc_vit_{size}.in1k": imagenet_cfg(f"{_RELEASES}1k_{size}.pth.tar", crop_pct=crop)
        for size, crop in {
            "xxtiny": 1.0,
            "xtiny": 0.875,
            "tiny": 1.0,
            "tiny2": 0.875,
            "small": 0.875,
            "small2": 0.875,
            "base": 1.0,
            "large": 1.0,
        }.items()
    }
    # These weights are for nets with the windows of their image size: see `GCViT`.
    | {
        f"gc_vit_large.in21k_in1k_{side}": imagenet_cfg(
            f"{_RELEASES}21k_large_{side}.pth.tar",
            crop_pct=1.0,
            input_size=(3, side, side),
            pool_size=(side // 32, side // 32),
        )
        for side in (384, 512)
    }
)


@register_model
def gc_vit_xxtiny(pretrained: bool = False, **kwargs) -> GCViT:
    return GCViT.build("gc_vit_xxtiny", pretrained, **{"depths": (2, 2, 6, 2)} | kwargs)


@register_model
def gc_vit_xtiny(pretrained: bool = False, **kwargs) -> GCViT:
    return GCViT.build("gc_vit_xtiny", pretrained, **{"depths": (3, 4, 6, 5)} | kwargs)


@register_model
def gc_vit_tiny(pretrained: bool = False, **kwargs) -> GCViT:
    return GCViT.build("gc_vit_tiny", pretrained, **kwargs)


@register_model
def gc_vit_tiny2(pretrained: bool = False, **kwargs) -> GCViT:
    return GCViT.build("gc_vit_tiny2", pretrained, **{"depths": (3, 4, 29, 5)} | kwargs)


@register_model
def gc_vit_small(pretrained: bool = False, **kwargs) -> GCViT:
    arguments = {"dim": 96, "heads": (3, 6, 12, 24), "mlp_ratio": 2.0, "layer_scale": 1e-5}
    return GCViT.build("gc_vit_small", pretrained, **arguments | kwargs)


@register_model
def gc_vit_small2(pretrained: bool = False, **kwargs) -> GCViT:
    arguments = {"dim": 96, "depths": (3, 4, 23, 5), "heads": (3, 6, 12, 24), "layer_scale": 1e-5}
    return GCViT.build("gc_vit_small2", pretrained, **arguments | kwargs)


@register_model
def gc_vit_base(pretrained: bool = False, **kwargs) -> GCViT:
    arguments = {"dim": 128, "heads": (4, 8, 16, 32), "mlp_ratio": 2.0, "layer_scale": 1e-5}
    return GCViT.build("gc_vit_base", pretrained, **arguments | kwargs)


@register_model
def gc_vit_large(pretrained: bool = False, **kwargs) -> GCViT:
    arguments = {"dim": 192, "heads": (6, 12, 24, 48), "mlp_ratio": 2.0, "layer_scale": 1e-5}
    return GCViT.build("gc_vit_large", pretrained, **arguments | kwargs)
