"""UniFormer: Unifying Convolution and Self-attention for Visual Recognition (Li et al., TPAMI 2023, arXiv:2201.09450).

Written after the paper and the authors' repository, Sense-X/UniFormer (Apache-2.0); its checkpoints load. Those trained
with token labelling have a second classifier, of tokens, which this net leaves out.
"""

import re
from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath, LayerNorm2d, LayerScale, Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, init_weights
from models.layers.conv import conv_bn
from models.layers.downsample import patch_embed
from ops import create_ops, parse_mixers
from ops.registry import Spec


class Block(nn.Module):
    """Depthwise-convolution position, token mixing and MLP, each added to the map (B, C, H, W).

    A convolutional block has batch norms, one of attention layer norms.
    """

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float, conv: bool, layer_scale: bool):
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = (nn.BatchNorm2d(dim) if conv else LayerNorm2d(dim, eps=1e-6) for _ in range(2))
        self.mixer = mixer
        self.mlp = Mlp(dim, 4 * dim)
        self.scale1, self.scale2 = (LayerScale(dim, 1e-6) if layer_scale else nn.Identity() for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **context) -> Tensor:
        x = x + self.pos_embed(x)
        mixed = self.scale1(self.mixer(self.norm1(x).permute(0, 2, 3, 1), **context))
        x = x + self.drop_path(mixed).permute(0, 3, 1, 2)
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class UniFormer(HierarchicalBackbone):
    """Two stages of convolutional blocks, two of self-attention.

    Args:
        dims, depths: channels and blocks of each stage.
        head_dim: channels of an attention head.
        window: side of the windows of the third stage's attention, for large images; 0 for the whole map.
        hybrid: let every fourth block of that stage attend to the whole map all the same.
        mixers: token mixers, as `ops.parse_mixers` reads them; by default the paper's.
        conv_stem: overlapping convolutions in place of patches, in the stem and between stages.
        layer_scale: number of last stages whose blocks have a learned factor for each channel of what they add.
    """

    renames = (
        (r"^aux_head\.", None),
        (r"^patch_embed(\d)\.proj\.(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.{match[2]}."),
        (r"^patch_embed(\d)\.proj\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.0."),
        (r"^patch_embed(\d)\.norm\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.1."),
        (r"^blocks(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks."),
        (r"\.conv1\.", ".mixer.value."),
        (r"\.conv2\.", ".mixer.proj."),
        (r"\.attn\.(weight|bias)$", r".mixer.affinity.\1"),
        (r"\.attn\.", ".mixer."),
        (r"\.gamma_(\d)$", r".scale\1.gamma"),
    )
    map_norms = True
    map_norm_eps = 1e-6  # of the authors' norms on dense features

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 8, 3),
        head_dim: int = 64,
        window: int = 0,
        hybrid: bool = False,
        mixers: Spec | Sequence | None = None,
        conv_stem: bool = False,
        layer_scale: int = 0,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        if mixers is None:
            relation = "multi_head_relation"
            third = [{"name": relation, "window": window}] * 3 + [{"name": relation, "window": 0 if hybrid else window}]
            mixers = [relation, relation, third, relation]
        specs = parse_mixers(mixers, depths)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        strides = [4 * 2**i for i in range(len(dims))]
        stages = []
        for i, dim in enumerate(dims):
            before = dims[i - 1] if i else in_chans
            if not conv_stem:
                downsample = patch_embed(before, dim, 2 if i else 4, eps=1e-5)
            elif i:
                downsample = nn.Sequential(*conv_bn(before, dim))
            else:
                downsample = nn.Sequential(*conv_bn(before, dim // 2), nn.GELU(), *conv_bn(dim // 2, dim))
            ops, contexts = create_ops(specs[i], dim, dim // head_dim, stage=i, stride=strides[i])
            scaled = i >= len(dims) - layer_scale
            blocks = [Block(dim, op, rate, i < 2, scaled) for op, rate in zip(ops, rates[i], strict=True)]
            stages.append(Stage(downsample, blocks, contexts))
        super().__init__(stages, dims, strides, nn.BatchNorm2d(dims[-1]), in_chans=in_chans, **kwargs)
        self.stages[2:].apply(init_weights)  # the linear layers of the others are the authors' 1 x 1 convolutions

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' layer scale is (1, C, 1, 1) in blocks of convolution."""
        state = super().checkpoint_filter(state)
        return {key: value.flatten() if re.search(r"scale\d\.gamma$", key) else value for key, value in state.items()}


default_cfgs = generate_default_cfgs(  # the authors' checkpoints lie where they cannot be fetched by address
    {
        f"uniformer_{size}": imagenet_cfg()
        for size in ("small", "small_plus", "small_plus_dim64", "base", "base_ls", "large_ls")
    }
)

SMALL_PLUS = {"depths": (3, 5, 9, 3), "conv_stem": True}
BASE = {"depths": (5, 8, 20, 7)}


@register_model
def uniformer_small(pretrained: bool = False, **kwargs) -> UniFormer:
    return UniFormer.build("uniformer_small", pretrained, **kwargs)


@register_model
def uniformer_small_plus(pretrained: bool = False, **kwargs) -> UniFormer:
    return UniFormer.build("uniformer_small_plus", pretrained, **SMALL_PLUS | {"head_dim": 32} | kwargs)


@register_model
def uniformer_small_plus_dim64(pretrained: bool = False, **kwargs) -> UniFormer:
    """The authors' form for dense tasks, whose fewer heads take less memory."""
    return UniFormer.build("uniformer_small_plus_dim64", pretrained, **SMALL_PLUS | kwargs)


@register_model
def uniformer_base(pretrained: bool = False, **kwargs) -> UniFormer:
    return UniFormer.build("uniformer_base", pretrained, **BASE | kwargs)


@register_model
def uniformer_base_ls(pretrained: bool = False, **kwargs) -> UniFormer:
    return UniFormer.build("uniformer_base_ls", pretrained, **BASE | {"layer_scale": 2} | kwargs)


@register_model
def uniformer_large_ls(pretrained: bool = False, **kwargs) -> UniFormer:
    large = {"dims": (128, 192, 448, 640), "depths": (5, 10, 24, 7), "layer_scale": 4}
    return UniFormer.build("uniformer_large_ls", pretrained, **large | kwargs)
