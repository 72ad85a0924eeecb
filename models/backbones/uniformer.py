"""UniFormer: Unifying Convolution and Self-attention for Visual Recognition (Li et al., TPAMI 2023, arXiv:2201.09450).

Written after the paper and the authors' repository, Sense-X/UniFormer (Apache-2.0); its checkpoints load. Checkpoints
trained with token labelling have a second classifier, for tokens, which the net has with `token_label`.
"""

import re
from collections.abc import Sequence

from timm.layers import DropPath, LayerNorm2d, LayerScale, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, init_weights, stage_layout
from models.layers.conv import conv_bn
from models.layers.downsample import patch_embed
from ops import create_ops, parse_mixers
from ops.registry import Spec


class Block(nn.Module):
    """Depthwise convolution (position), token mixing and MLP, each added to the map (B, C, H, W).

    Args:
        dim: Number of channels.
        mixer: Token mixer.
        drop_path: Drop path rate.
        conv: Use batch norms, as the paper's blocks without attention do; layer norms otherwise.
        layer_scale: Learn a factor for each channel of what the mixer and the MLP add.
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
    """Pyramid of two stages of convolutional blocks and two stages of blocks with self-attention.

    Args:
        dims: Number of channels of each stage.
        depths: Number of blocks in each stage.
        head_dim: Number of channels of an attention head.
        window: Side of the windows of the third stage's attention, for large images; 0 is the whole map.
        hybrid: With windows, let every fourth block of the third stage attend to the whole map.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: as above.
        conv_stem: Use overlapping convolutions instead of patches, in the stem and between stages.
        layer_scale: Number of last stages whose blocks have a learned factor for each channel of what they add.
        token_label: Add a classifier for the map's tokens, as the authors do for token labels. Half of each class's
            maximum over the tokens is added to the scores.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
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
    # Epsilon of the authors' norms on dense features.
    map_norm_eps = 1e-6

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
        token_label: bool = False,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        if token_label:
            self.classifiers = ("head", "aux_head")
            self.renames = tuple(pair for pair in self.renames if pair[1] is not None)
        if mixers is None:
            relation = "multi_head_relation"
            third = [{"name": relation, "window": window}] * 3 + [{"name": relation, "window": 0 if hybrid else window}]
            mixers = [relation, relation, third, relation]
        specs = parse_mixers(mixers, depths)
        dims, strides, rates = stage_layout(dims, depths, drop_path_rate)
        stages = []
        for i, dim in enumerate(dims):
            in_dim = dims[i - 1] if i else in_chans
            if not conv_stem:
                downsample = patch_embed(in_dim, dim, 2 if i else 4, eps=1e-5)
            elif i:
                downsample = nn.Sequential(*conv_bn(in_dim, dim))
            else:
                downsample = nn.Sequential(*conv_bn(in_dim, dim // 2), nn.GELU(), *conv_bn(dim // 2, dim))
            ops, contexts = create_ops(specs[i], dim, dim // head_dim, stage=i, stride=strides[i])
            scaled = i >= len(dims) - layer_scale
            blocks = [
                Block(dim, op, rate, conv=i < 2, layer_scale=scaled) for op, rate in zip(ops, rates[i], strict=True)
            ]
            stages.append(Stage(downsample, blocks, contexts))
        super().__init__(stages, dims, strides, nn.BatchNorm2d(dims[-1]), in_chans=in_chans, **kwargs)
        # The linear layers of the first two stages are 1 x 1 convolutions in the authors' code, which keep PyTorch's
        # initialisation.
        self.stages[2:].apply(init_weights)

    @property
    def token_classifier(self) -> nn.Module | None:
        return getattr(self, "aux_head", None)

    def map_tokens(self, features: Tensor) -> Tensor:
        return features.flatten(2).transpose(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        scores = super().forward_head(x, pre_logits)
        if pre_logits or scores.ndim != 2 or not self.num_classes or self.token_classifier is None:
            return scores
        return scores + 0.5 * self.token_classifier(self.map_tokens(x)).amax(1)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the authors' weights, and flatten the layer scales of convolutional blocks, (1, C, 1, 1), to (C,)."""
        state = super().checkpoint_filter(state)
        return {key: value.flatten() if re.search(r"scale\d\.gamma$", key) else value for key, value in state.items()}


# The authors' checkpoints cannot be downloaded by a plain address, so no entry has one.
default_cfgs = generate_default_cfgs(
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
    """Build the authors' variant for dense tasks, which has fewer heads to save memory."""
    return UniFormer.build("uniformer_small_plus_dim64", pretrained, **SMALL_PLUS | kwargs)


@register_model
def uniformer_base(pretrained: bool = False, **kwargs) -> UniFormer:
    return UniFormer.build("uniformer_base", pretrained, **BASE | kwargs)


@register_model
def uniformer_base_ls(pretrained: bool = False, **kwargs) -> UniFormer:
    return UniFormer.build("uniformer_base_ls", pretrained, **BASE | {"layer_scale": 2} | kwargs)


@register_model
def uniformer_large_ls(pretrained: bool = False, **kwargs) -> UniFormer:
    arguments = {"dims": (128, 192, 448, 640), "depths": (5, 10, 24, 7), "layer_scale": 4}
    return UniFormer.build("uniformer_large_ls", pretrained, **arguments | kwargs)
