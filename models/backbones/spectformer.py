"""SpectFormer: Frequency and Attention is what you need in a Vision Transformer (Patro et al., arXiv:2304.06446).

Spectral gating in the first blocks, attention in the others: plain nets (`spectformer_*`; the paper's vanilla ones) and
pyramids (`spectformer_h_*`). Written after the paper and the authors' repository, badripatro/SpectFormers (no licence
of its own). The authors' code has 6 heads in all plain nets, which do not divide the widths of tiny and base: 4 and 8
heads are ours.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from timm.models.volo import ClassBlock
from torch import Tensor, nn

from models import plain
from models.backbones.deit import deit_cfg
from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, stage_layout
from models.layers.position import grid_of
from models.layers.pvt_v2 import RENAMES, Block, DepthwiseMlp, NormedStage, init_conv
from ops import create_ops, parse_mixers
from ops.attention.spectral_gating import SpectralGating
from ops.registry import Spec


class SpectralBlock(plain.Block):
    """Block of ViT-shaped nets in which spectral gating and the MLP have one residual connection together."""

    def forward(self, x: Tensor, size: Sequence[int], **context) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(self.mix(self.norm1(x), size, **context))))


def plain_block(dim: int, mixer: nn.Module, *args: Any) -> plain.Block:
    """Return a block for a mixer: `SpectralBlock` for spectral gating, else ViT's block."""
    return (SpectralBlock if isinstance(mixer, SpectralGating) else plain.Block)(dim, mixer, *args)


class SpectFormer(plain.PlainBackbone):
    """Plain net with spectral gating in the first blocks and full attention in the others, without a class token.

    Args:
        img_size: Side or (height, width) in pixels of the images that positions and filters are learned for.
        patch: Side of a patch in pixels.
        depths: Number of blocks, as one entry.
        spectral_blocks: Number of leading blocks with spectral gating.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: as above.
        **kwargs: Further arguments of `PlainBackbone`.
    """

    block: Any = staticmethod(plain_block)
    renames = ((r"^(blocks\.\d+)\.(?:filter|attn)\.", r"\1.mixer."),)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch: int = 16,
        depths: Sequence[int] = (12,),
        spectral_blocks: int = 4,
        mixers: Spec | Sequence | None = None,
        **kwargs,
    ):
        if mixers is None:
            gating = {"name": "spectral_gating", "size": grid_of(img_size, patch)}
            mixers = [[gating if i < spectral_blocks else "full" for i in range(depths[0])]]
        kwargs.setdefault("class_token", False)
        super().__init__(img_size=img_size, patch=patch, depths=depths, mixers=mixers, **kwargs)


class SpectFormerH(HierarchicalBackbone):
    """Pyramid with spectral gating in the first two stages, full attention in the others, and class attention.

    The class token begins as the mean of the last map. With token labels, a second classifier reads the map's tokens,
    and half of the highest score of each class over the tokens is added to the class token's scores.

    Args:
        dims: Number of channels of each stage.
        depths: Number of blocks in each stage.
        heads: Number of attention heads in each stage.
        mlp_ratios: Width of the MLP in each stage, relative to the channels.
        stem_dim: Number of channels of the stem's first convolutions.
        token_label: Whether there is a classifier for the map's tokens.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: as above.
        img_size: Side or (height, width) in pixels of the images that the filters are learned for.
        patch: Stride of the stem, 2 or 4 pixels.
        in_chans: Number of channels of the images.
        global_pool: "token", "avg" or "".
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    renames = (
        (r"^patch_embed1\.conv\.", "stages.0.downsample."),
        (r"^patch_embed1\.proj\.", "stages.0.downsample.9."),
        (r"^patch_embed1\.norm\.", "stages.0.downsample.10."),
        (r"^norm4\.", "norm."),
        (r"^post_network\.0\.", "class_block."),
        (r"^aux_head\.", "head.aux."),
        *RENAMES,
        (r"^class_block\.mixer\.", "class_block.attn."),
    )
    # Checkpoints with token labels load without them too.
    unused_weights = ("head.aux.weight", "head.aux.bias")

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 448),
        depths: Sequence[int] = (3, 4, 6, 3),
        heads: Sequence[int] = (2, 4, 10, 14),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        stem_dim: int = 32,
        token_label: bool = True,
        mixers: Spec | Sequence | None = None,
        img_size: int | tuple[int, int] = 224,
        patch: int = 4,
        in_chans: int = 3,
        global_pool: str = "token",
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        if patch not in (2, 4):
            raise ValueError(f"patch must be 2 or 4, not {patch}")
        dims, strides, rates = stage_layout(dims, depths, drop_path_rate, patch)
        if mixers is None:
            gating = [{"name": "spectral_gating", "size": grid_of(img_size, stride)} for stride in strides[:2]]
            mixers = [*gating, *({"name": "spatial_reduction", "ratio": 1},) * (len(dims) - 2)]
        specs = parse_mixers(mixers, depths)
        stages = []
        for i, dim in enumerate(dims):
            ops, contexts = create_ops(specs[i], dim, heads[i], stage=i, stride=strides[i])
            mlps = [DepthwiseMlp(dim, int(dim * mlp_ratios[i])) for _ in ops]
            blocks = [Block(dim, *parts) for parts in zip(ops, mlps, rates[i], strict=True)]
            in_dim = dims[i - 1] if i else in_chans
            stages.append(NormedStage(in_dim, dim, i == 0, blocks, contexts))
        stages[0].downsample = stem(in_chans, stem_dim, dims[0], patch)
        # The class token attends to the last map before its norm.
        stages[-1] = Stage(stages[-1].downsample, list(stages[-1].blocks), contexts)
        self.token_label = token_label
        norm = LayerNorm2d(dims[-1], eps=1e-6)
        super().__init__(stages, dims, strides, norm, in_chans=in_chans, global_pool=global_pool, **kwargs)
        norm_class: Any = partial(nn.LayerNorm, eps=1e-6)
        self.class_block = ClassBlock(
            dims[-1], heads[-1], mlp_ratio=mlp_ratios[-1], qkv_bias=True, norm_layer=norm_class
        )
        self.apply(init_conv)

    def reset_pool(self, global_pool: str) -> None:
        self.global_pool = plain.TokenPool(global_pool, 1)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if num_classes and self.token_label:
            # A part of `head`, so that it goes where a classifier of another width goes.
            head: Any = self.head
            head.aux = nn.Linear(self.num_features, num_classes).to(head.weight)
            init_conv(head.aux)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.class_block = None
        return take

    @property
    def token_classifier(self) -> nn.Module | None:
        return getattr(self.head, "aux", None)

    def map_tokens(self, features: Tensor) -> Tensor:
        return features[:, 1:]

    def finish(self, x: Tensor) -> Tensor:
        """Return the final tokens (B, 1 + H * W, C), of which the first is the class token."""
        x = x.flatten(2).transpose(1, 2)
        if self.class_block is not None:
            x = self.class_block(torch.cat([x.mean(1, keepdim=True), x], dim=1))
        return self.norm(x.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        scores = super().forward_head(x, pre_logits)
        label: Any = None if pre_logits else getattr(self.head, "aux", None)
        return scores if label is None else scores + 0.5 * label(x[:, 1:]).amax(1)


def stem(in_chans: int, hidden: int, dim: int, patch: int) -> nn.Sequential:
    """Return four convolutions and a norm, which bring an image to a map of `dim` channels and stride `patch`."""
    layers: list[nn.Module] = []
    for i in range(3):
        conv = nn.Conv2d(hidden, hidden, 3, 1, 1, bias=False) if i else nn.Conv2d(in_chans, hidden, 7, 2, 3, bias=False)
        layers += [conv, nn.BatchNorm2d(hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(hidden, dim, 3, patch // 2, 1), LayerNorm2d(dim, eps=1e-5))


_STEM = {"first_conv": "stages.0.downsample.0", "fixed_input_size": True}
default_cfgs = generate_default_cfgs(
    {f"spectformer_{size}": deit_cfg("") for size in ("tiny", "xsmall", "small", "base")}
    | {"spectformer_h_nano": imagenet_cfg(input_size=(3, 32, 32), pool_size=(2, 2), **_STEM)}
    | {f"spectformer_h_{size}": imagenet_cfg(**_STEM) for size in ("small", "base", "large")}
)


@register_model
def spectformer_tiny(pretrained: bool = False, **kwargs) -> SpectFormer:
    return SpectFormer.build("spectformer_tiny", pretrained, **{"dim": 256, "heads": 4} | kwargs)


@register_model
def spectformer_xsmall(pretrained: bool = False, **kwargs) -> SpectFormer:
    return SpectFormer.build("spectformer_xsmall", pretrained, **{"dim": 384, "heads": 6} | kwargs)


@register_model
def spectformer_small(pretrained: bool = False, **kwargs) -> SpectFormer:
    return SpectFormer.build("spectformer_small", pretrained, **{"dim": 384, "depths": (19,), "heads": 6} | kwargs)


@register_model
def spectformer_base(pretrained: bool = False, **kwargs) -> SpectFormer:
    return SpectFormer.build("spectformer_base", pretrained, **{"dim": 512, "depths": (19,), "heads": 8} | kwargs)


@register_model
def spectformer_h_nano(pretrained: bool = False, **kwargs) -> SpectFormerH:
    """Return a small net of our own for small images and CPUs; 32 pixels give maps of 16, 8, 4 and 2 tokens a side."""
    dims, depths, heads, ratios = (32, 64, 128, 256), (2, 2, 2, 2), (1, 2, 4, 8), (4, 4, 4, 4)
    layout = {"dims": dims, "depths": depths, "heads": heads, "mlp_ratios": ratios, "stem_dim": 16}
    arguments = layout | {"token_label": False, "img_size": 32, "patch": 2}
    return SpectFormerH.build("spectformer_h_nano", pretrained, **arguments | kwargs)


@register_model
def spectformer_h_small(pretrained: bool = False, **kwargs) -> SpectFormerH:
    return SpectFormerH.build("spectformer_h_small", pretrained, **kwargs)


@register_model
def spectformer_h_base(pretrained: bool = False, **kwargs) -> SpectFormerH:
    dims, depths, heads = (64, 128, 320, 512), (3, 4, 12, 3), (2, 4, 10, 16)
    arguments = {"dims": dims, "depths": depths, "heads": heads, "stem_dim": 64}
    return SpectFormerH.build("spectformer_h_base", pretrained, **arguments | kwargs)


@register_model
def spectformer_h_large(pretrained: bool = False, **kwargs) -> SpectFormerH:
    dims, depths, heads = (96, 192, 384, 512), (3, 6, 18, 3), (3, 6, 12, 16)
    arguments = {"dims": dims, "depths": depths, "heads": heads, "stem_dim": 64}
    return SpectFormerH.build("spectformer_h_large", pretrained, **arguments | kwargs)
