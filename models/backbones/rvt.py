"""RVT: Towards Robust Vision Transformer (Mao et al., CVPR 2022, arXiv:2105.07926).

Also RVT with token-aware average pooling and attention diversification: Robustifying Token Attention for Vision
Transformers (Guo et al., ICCV 2023, arXiv:2303.11126). Written after the papers and their repositories,
vtddggg/Robust-Vision-Transformer (which states no licence) and guoyongcs/TAPADL (MIT); the checkpoints of both load.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg
from models.layers.position import grid_of
from models.layers.token_pooling import TokenAwarePooling
from ops import create_ops, parse_mixers
from ops.registry import Spec
from retinue.utils.arithmetic import padding


class ConvMlp(nn.Module):
    """MLP on maps (B, H, W, C) with a depthwise convolution of the hidden map, and a batch norm after each layer."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.bn1 = nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden)
        self.dwconv, self.bn2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.BatchNorm2d(hidden)
        self.fc2, self.bn3 = nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn1(self.fc1(x.permute(0, 3, 1, 2))))
        return self.bn3(self.fc2(F.gelu(self.bn2(self.dwconv(x))))).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Token mixing and MLP, each added to the map (B, C, H, W); with TAP, pooled tokens are mixed."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float, scales: int, linear_mlp: bool):
        super().__init__()
        self.pool = TokenAwarePooling(dim, scales) if scales else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim) if linear_mlp else ConvMlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **context) -> Tensor:
        pooled = x if self.pool is None else self.pool(x)
        mixed = self.mixer(self.norm1(pooled.permute(0, 2, 3, 1)), **context)
        x = x + self.drop_path(mixed.permute(0, 3, 1, 2))
        return x + self.drop_path(self.mlp(self.norm2(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2))


class Embedding(nn.Sequential):
    """Convolutions and pooling from images to a map of stride `patch`; images are zero-padded to whole patches.

    Args:
        in_chans: Channels of the images.
        dim: Channels of the map.
        patch: Side of a patch in pixels: 16, or 4 (for small images).
    """

    def __init__(self, in_chans: int, dim: int, patch: int):
        side = patch // 4
        super().__init__(
            nn.Conv2d(in_chans, 32, 7, 2, padding=2),
            nn.BatchNorm2d(32),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(32, dim, side, side),
        )
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, padding(x.shape[3], self.patch), 0, padding(x.shape[2], self.patch))))


class RVT(HierarchicalBackbone):
    """One or two stages of full attention, whose scores RVT* scales by learned positions, and of convolutional MLPs.

    The MLPs of RVT-B are linear in its authors' code, and convolutional with token-aware average pooling.

    Args:
        dims: Channels of each stage.
        depths: Number of blocks in each stage.
        heads: Number of attention heads in each stage.
        patch: Side of a patch in pixels: 16, or 4.
        masked: Number of first blocks whose attention scores are scaled by positions.
        scales: Candidates of token-aware average pooling; 0 leaves it out. TAP's nets have 4.
        linear_mlp: Leave out the convolutions of the MLPs if there is no token-aware average pooling.
        diversity: Threshold of attention diversification, as in the op "full"; 0 leaves it out. TAP's nets have 2.
        img_size: Size, in pixels, of the images that the positions are learned for.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: full attention.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate after the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.

    Raises:
        ValueError: `patch` is another number, or `dims` and `depths` differ in length.
    """

    out_indices = None
    renames = (
        (r"^patch_embed\.proj\.", "stages.0.downsample."),
        (r"^transformers\.", "stages."),
        (r"^pools\.(\d)\.conv\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
        (r"^norm\.", "head_norm."),
        (r"\.attn\.", ".mixer."),
        (r"\.dilation_predictor\.", ".pool."),
    )

    def __init__(
        self,
        dims: Sequence[int] = (384,),
        depths: Sequence[int] = (12,),
        heads: Sequence[int] = (6,),
        patch: int = 16,
        masked: int = 0,
        scales: int = 0,
        linear_mlp: bool = False,
        diversity: float = 0.0,
        img_size: int | tuple[int, int] = 224,
        mixers: Spec | Sequence | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        if patch not in (4, 16) or len(dims) != len(depths):
            raise ValueError(
                f"patch must be 16 or 4 pixels, and dims and depths have one entry per stage; not {patch}, {dims} and "
                f"{depths}"
            )
        if mixers is None:
            full = {"name": "full", "diversity": diversity}
            scaled = {"name": "position_aware", "diversity": diversity, "size": grid_of(img_size, patch)}
            first = [scaled if i < masked else full for i in range(depths[0])]
            mixers = [first, *[full] * (len(depths) - 1)]
        specs = parse_mixers(mixers, depths)
        strides = [patch * 2**i for i in range(len(dims))]
        stages, block = [], 0
        for i, dim in enumerate(dims):
            downsample: nn.Module = Embedding(in_chans, dim, patch)
            if i:
                downsample = nn.Conv2d(dims[i - 1], dim, 3, 2, padding=1, groups=dims[i - 1])
            ops, contexts = create_ops(specs[i], dim, heads[i], stage=i + 2, stride=strides[i])
            rates = [drop_path_rate * (block + j) / sum(depths) for j in range(depths[i])]
            block += depths[i]
            linear = linear_mlp and not scales
            blocks = [Block(dim, op, rate, scales, linear) for op, rate in zip(ops, rates, strict=True)]
            stages.append(Stage(downsample, blocks, contexts))
        super().__init__(stages, dims, strides, nn.Identity(), in_chans=in_chans, **kwargs)
        self.head_norm: nn.Module = nn.LayerNorm(dims[-1], eps=1e-6)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if isinstance(self.head, nn.Linear):
            # The authors leave PyTorch's initialisation.
            self.head.reset_parameters()

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.head_norm = nn.Identity()
        return take

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        x = self.head_drop(self.head_norm(x) if x.ndim == 2 else x)
        return x if pre_logits else self.head(x)


CONV = "stages.0.downsample.0"
default_cfgs = generate_default_cfgs(
    {
        f"rvt_{size}{plus}": imagenet_cfg(first_conv=CONV, fixed_input_size=bool(plus))
        for size in ("tiny", "small", "base")
        for plus in ("", "_plus")
    }
)

TINY = {"dims": (192, 384), "depths": (10, 2), "heads": (6, 12)}
BASE = {"dims": (768,), "heads": (12,), "linear_mlp": True}


@register_model
def rvt_tiny(pretrained: bool = False, **kwargs) -> RVT:
    return RVT.build("rvt_tiny", pretrained, **TINY | kwargs)


@register_model
def rvt_tiny_plus(pretrained: bool = False, **kwargs) -> RVT:
    return RVT.build("rvt_tiny_plus", pretrained, **{**TINY, "masked": 10} | kwargs)


@register_model
def rvt_small(pretrained: bool = False, **kwargs) -> RVT:
    return RVT.build("rvt_small", pretrained, **kwargs)


@register_model
def rvt_small_plus(pretrained: bool = False, **kwargs) -> RVT:
    return RVT.build("rvt_small_plus", pretrained, **{"masked": 5} | kwargs)


@register_model
def rvt_base(pretrained: bool = False, **kwargs) -> RVT:
    return RVT.build("rvt_base", pretrained, **BASE | kwargs)


@register_model
def rvt_base_plus(pretrained: bool = False, **kwargs) -> RVT:
    return RVT.build("rvt_base_plus", pretrained, **{**BASE, "masked": 5} | kwargs)
