"""FAN: Understanding the Robustness in Vision Transformers (Zhou et al., ICML 2022, arXiv:2204.12451).

Also FAN with token-aware average pooling and attention diversification: Robustifying Token Attention for Vision
Transformers (Guo et al., ICCV 2023, arXiv:2303.11126). Written after the papers and the latter's repository,
guoyongcs/TAPADL (MIT), which has both nets; its checkpoints load. The layout is XCiT's, so timm's layers serve.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models._manipulate import MATCH_PREV_GROUP
from timm.models.xcit import ClassAttentionBlock, PositionalEncodingFourier
from torch import Tensor, nn

from models.backbones.deit import deit_cfg
from models.hierarchical import init_weights
from models.layers.channel_attention import ChannelAttention
from models.layers.conv_stem import STRIDES, ConvStem, HybridStem
from models.layers.downsample import TokenDownsample
from models.layers.pvt_v2 import init_conv
from models.layers.token_pooling import TokenAwarePooling
from models.plain import PlainBackbone, TokenPool
from models.weights import join_projections
from ops import create_ops, parse_mixers
from ops.registry import Spec
from retinue.utils.arithmetic import ceil_div


class Block(nn.Module):
    """Token mixing and channel attention, each scaled and added to the tokens; with TAP, pooled tokens are mixed.

    Attributes:
        downsample: Layer after the block that halves the map's sides, or None.
    """

    downsample: nn.Module | None

    def __init__(
        self, dim: int, mixer: nn.Module, mlp_ratio: float, drop_path: float, eps: float, heads: int, scales: int
    ):
        super().__init__()
        self.pool = TokenAwarePooling(dim, scales) if scales else None
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = ChannelAttention(dim, heads, int(mlp_ratio * dim), eps)
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.drop_path = DropPath(drop_path)
        self.register_module("downsample", None)

    def forward(self, x: Tensor, size: Sequence[int], **context) -> Tensor:
        mixed = x.unflatten(1, tuple(size))
        if self.pool is not None:
            mixed = self.pool(mixed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.gamma1 * self.mixer(self.norm1(mixed), **context).flatten(1, 2))
        x = x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x), size))
        return x if self.downsample is None else self.downsample(x, size)


class FAN(PlainBackbone):
    """XCiT's layout with full attention, channel attention and, on request, token-aware average pooling.

    The class token joins after the blocks and reads the map in two layers of class attention. Maps, as of
    `features_only`, are those of the blocks.

    Args:
        dim: As in `PlainBackbone`.
        depths: As in `PlainBackbone`.
        heads: As in `PlainBackbone`.
        patch: Side of a patch in pixels: 16, 8 or 4.
        hybrid: Numbers of blocks of two stages of ConvNeXt, of strides 4 and 8, which replace the first convolutions;
            () has none. A hybrid net has patches of 16 pixels.
        scales: Candidates of token-aware average pooling; 0 leaves it out. TAP's nets have 4.
        tail: Number of the last blocks, their channels and their heads; their map has half the resolution. () has none.
        diversity: Threshold of attention diversification, as in the op "full"; 0 leaves it out. TAP's nets have 2.
        head_scale: Factor of the classifier's initial weights.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: full attention.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate of all blocks.
        **kwargs: Further arguments of `PlainBackbone`; `global_pool` is "token" by default.

    Raises:
        ValueError: `patch` is another number, or an op of the tail needs a context.
    """

    positions = False
    renames = (
        (r"\.attn_map$", None),
        (r"^pos_embed\.", "position."),
        (r"^(blocks\.\d+)\.attn\.", r"\1.mixer."),
        (r"\.dilation_predictor\.", ".pool."),
    )

    def __init__(
        self,
        dim: int = 384,
        depths: Sequence[int] = (12,),
        heads: int = 8,
        patch: int = 16,
        hybrid: Sequence[int] = (),
        scales: int = 0,
        tail: Sequence[int] = (),
        diversity: float = 0.0,
        head_scale: float = 1.0,
        mixers: Spec | Sequence | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        if patch not in STRIDES or (hybrid and patch != 16):
            raise ValueError(f"patch must be 16, 8 or 4 pixels, and 16 in a hybrid net, not {patch}")
        mixers = {"name": "full", "diversity": diversity} if mixers is None else mixers
        self.block: Any = partial(Block, heads=heads, scales=scales)
        kwargs.setdefault("global_pool", "token")
        super().__init__(
            dim=dim, depths=depths, heads=heads, patch=patch, mixers=mixers, in_chans=in_chans, class_token=False,
            **kwargs,
        )  # fmt: skip
        if tail:
            number, wider, heads = tail
            self.block = partial(Block, heads=heads, scales=scales)
            self.build_tail(number, wider, heads, parse_mixers(mixers, depths)[0][-number:], kwargs.get("mlp_ratio", 4))
        for block in self.blocks:
            block.drop_path = DropPath(drop_path_rate)
        self.patch_embed = HybridStem(in_chans, dim, hybrid) if hybrid else ConvStem(in_chans, dim, patch)
        self.position = PositionalEncodingFourier(dim=dim)
        dim = self.num_features
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        norm: Any = partial(nn.LayerNorm, eps=self.eps)
        self.cls_attn_blocks = nn.Sequential(
            *(ClassAttentionBlock(dim, heads, qkv_bias=True, norm_layer=norm, tokens_norm=True) for _ in range(2))
        )
        self.cls_attn_blocks.apply(init_weights)
        if isinstance(self.head, nn.Linear):
            self.head.weight.data.mul_(head_scale)

    def build_tail(self, number: int, dim: int, heads: int, specs: Sequence[Spec], mlp_ratio: float) -> None:
        """Replace the last blocks by blocks of `dim` channels on maps of half the resolution."""
        before, stride = list(self.blocks)[:-number], 2 * self.feature_info[0]["reduction"]
        ops, contexts = create_ops(specs, dim, heads, stage=round(math.log2(stride / 4)), stride=stride)
        if not before or any(module is not None for module in contexts):
            raise ValueError("the tail must be fewer blocks than the net has, of ops that need no context")
        last: Any = before[-1]
        last.downsample = TokenDownsample(self.embed_dim, dim).apply(init_conv)
        self.blocks = nn.Sequential(*before, *(self.block(dim, op, mlp_ratio, 0.0, self.eps) for op in ops))
        self.blocks[-number:].apply(init_weights)
        for info in self.feature_info[len(before) - 1 :]:
            info |= {"num_chs": dim, "reduction": stride}
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        self.norm = nn.LayerNorm(dim, eps=self.eps)
        self.reset_classifier(self.num_classes)

    def reset_pool(self, global_pool: str) -> None:
        self.global_pool = TokenPool(global_pool, 1)

    def reduced_size(self, size: tuple[int, int], tokens: int) -> tuple[int, int]:
        return ceil_div(size[0], 2), ceil_div(size[1], 2)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        groups = super().group_matcher(coarse)
        after_the_blocks = (r"^(?:cls_token|cls_attn_blocks\.)", MATCH_PREV_GROUP)
        return {
            "stem": r"^(?:position|patch_embed|contexts)",
            "blocks": [groups["blocks"][0], after_the_blocks, *groups["blocks"][1:]],
        }

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return join_projections(self, super().checkpoint_filter(state))

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.patch_embed(x)
        size = (x.shape[2], x.shape[3])
        return (x + self.position(1, *size)).flatten(2).transpose(1, 2), size

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.cls_token, self.cls_attn_blocks = None, nn.Sequential()
        return take

    def map_tokens(self, features: Tensor) -> Tensor:
        """Return the tokens of the map, without the class token that joins last."""
        return features[:, int(self.cls_token is not None) :]

    def finish(self, x: Tensor) -> Tensor:
        if self.cls_token is not None:
            x = self.cls_attn_blocks(torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1))
        return self.norm(x)


SIZES = ("tiny", "small", "base", "large")
_CFG: Any = deit_cfg("") | {"fixed_input_size": False}
default_cfgs = generate_default_cfgs(
    {f"fan_{size}": _CFG | {"first_conv": "patch_embed.proj.0.0"} for size in SIZES}
    | {f"fan_{size}_hybrid": _CFG | {"first_conv": "patch_embed.backbone.stem.0"} for size in (*SIZES, "xlarge")}
)


@register_model
def fan_tiny(pretrained: bool = False, **kwargs) -> FAN:
    return FAN.build("fan_tiny", pretrained, **{"dim": 192, "heads": 4} | kwargs)


@register_model
def fan_small(pretrained: bool = False, **kwargs) -> FAN:
    return FAN.build("fan_small", pretrained, **kwargs)


@register_model
def fan_base(pretrained: bool = False, **kwargs) -> FAN:
    return FAN.build("fan_base", pretrained, **{"dim": 448, "depths": (18,)} | kwargs)


@register_model
def fan_large(pretrained: bool = False, **kwargs) -> FAN:
    return FAN.build("fan_large", pretrained, **{"dim": 480, "depths": (24,), "heads": 10} | kwargs)


@register_model
def fan_tiny_hybrid(pretrained: bool = False, **kwargs) -> FAN:
    return FAN.build("fan_tiny_hybrid", pretrained, **{"dim": 192, "depths": (8,), "hybrid": (3, 3)} | kwargs)


@register_model
def fan_small_hybrid(pretrained: bool = False, **kwargs) -> FAN:
    return FAN.build("fan_small_hybrid", pretrained, **{"depths": (10,), "hybrid": (3, 3)} | kwargs)


@register_model
def fan_base_hybrid(pretrained: bool = False, **kwargs) -> FAN:
    return FAN.build("fan_base_hybrid", pretrained, **{"dim": 448, "depths": (16,), "hybrid": (3, 3)} | kwargs)


@register_model
def fan_large_hybrid(pretrained: bool = False, **kwargs) -> FAN:
    arguments = {"dim": 480, "depths": (22,), "heads": 10, "hybrid": (3, 5), "head_scale": 0.001}
    return FAN.build("fan_large_hybrid", pretrained, **arguments | kwargs)


@register_model
def fan_xlarge_hybrid(pretrained: bool = False, **kwargs) -> FAN:
    arguments = {"dim": 528, "depths": (23,), "heads": 11, "hybrid": (3, 7), "tail": (3, 768, 16)}
    return FAN.build("fan_xlarge_hybrid", pretrained, **arguments | kwargs)
