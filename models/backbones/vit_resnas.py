"""ViT-ResNAS: Searching for Efficient Multi-Stage Vision Transformers (Liao, Karaman and Sze, 2021, arXiv:2109.00642).

Written after the paper and what the authors' repository, yilunliao/vit-search, computes. Its licence (CC BY-NC 4.0)
forbids commercial use, so none of its code is here; its checkpoints load. Weights of a second classifier, which the
authors train on patches of mixed images, are left out.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from timm.layers import Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models import plain
from models.hierarchical import HierarchicalBackbone, imagenet_cfg, init_weights, to_channels_last
from models.layers.position import grid_of
from models.layers.token_stage import SpatialReduction, TokenStage, TokenStem
from ops import create_ops, parse_mixers
from ops.attention.full import FullAttention
from ops.registry import FIRST, Spec, take_extra
from ops.softmax import SoftmaxOptions

# Side of a patch in pixels
PATCH = 14


class Layout(NamedTuple):
    """Searched sizes of a stage.

    Attributes:
        dim: Number of channels.
        head_dim: Number of channels of an attention head.
        heads: Number of attention heads of each block.
        hidden: Number of hidden channels of each block's MLP.
    """

    dim: int
    head_dim: int
    heads: Sequence[int]
    hidden: Sequence[int]


class Attention(FullAttention):
    """Full attention whose heads need not divide the channels."""

    def __init__(self, dim: int, num_heads: int, head_dim: int):
        super().__init__(dim, 1)
        self.num_heads, self.softmax = num_heads, SoftmaxOptions(num_heads, head_dim, FIRST)
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim)
        self.proj = nn.Linear(num_heads * head_dim, dim)


class Block(plain.Block):
    """Block of ViT-shaped nets with any number of hidden channels."""

    def __init__(self, dim: int, mixer: nn.Module, hidden: int, drop_path: float):
        super().__init__(dim, mixer, drop_path=drop_path)
        self.mlp = Mlp(dim, hidden)


class ViTResNAS(HierarchicalBackbone):
    """Three stages of transformer blocks of searched sizes, with strides of 14, 28 and 56 pixels.

    The class token goes through all stages if all ops take extra tokens; otherwise the classifier reads the mean of the
    last map.

    Args:
        layouts: Searched sizes of each stage, as `Layout` or as a list of its attributes.
        stem: Number of channels of the convolutions before the patches; 0 leaves them out.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: full attention with the searched heads. Other
            ops have the largest number of heads up to that of the stage's first block that divides the channels.
        img_size: Side or (height, width) in pixels of the images that the positions are learned for.
        in_chans: Number of channels of the images.
        global_pool: "token", "avg" or "". Default: "token" with a class token, "avg" without one.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    out_indices = (0, 1, 2)
    renames = (
        (r"^tokens$", "stages.0.downsample.cls_token"),
        (r"^pos_embed$", "stages.0.downsample.pos_embed"),
        (r"^patch_embed\.conv(\d)\.conv\.", lambda match: f"stages.0.downsample.convs.{int(match[1]) - 1}.conv."),
        (r"^patch_embed\.conv(\d)\.bn\.", lambda match: f"stages.0.downsample.convs.{int(match[1]) - 1}.norm."),
        (r"^patch_embed\.(conv_)?proj\.", "stages.0.downsample.proj."),
        (r"\.attn\.", ".mixer."),
        (r"^cls_head\.", "head."),
    )
    unused_weights = frozenset({"patch_head.weight", "patch_head.bias"})

    def __init__(
        self,
        layouts: Sequence[Layout],
        stem: int = 24,
        mixers: Spec | Sequence | None = None,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        global_pool: str | None = None,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        # A config has lists.
        layouts = [Layout(*layout) for layout in layouts]
        depths = [len(layout.heads) for layout in layouts]
        specs = parse_mixers("full" if mixers is None else mixers, depths)
        self.extra = int(take_extra(spec for stage in specs for spec in stage))
        strides = [PATCH * 2**i for i in range(len(layouts))]
        rates: Any = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, (dim, head_dim, heads, hidden) in enumerate(layouts):
            grid = grid_of(img_size, strides[i])
            if i:
                downsample = SpatialReduction(layouts[i - 1].dim, dim, grid, self.extra)
            else:
                downsample = TokenStem(in_chans, dim, stem, PATCH, grid, self.extra)
            if mixers is None:
                ops, contexts = [Attention(dim, number, head_dim) for number in heads], ()
            else:
                number = max(n for n in range(1, heads[0] + 1) if dim % n == 0)
                ops, contexts = create_ops(specs[i], dim, number, stage=i + 2, stride=strides[i], extra=self.extra)
            blocks = [Block(dim, *parts) for parts in zip(ops, hidden, rates[i], strict=True)]
            stages.append(TokenStage(downsample, blocks, contexts))
        if global_pool is None:
            global_pool = "token" if self.extra else "avg"
        dims = [layout.dim for layout in layouts]
        norm = nn.LayerNorm(dims[-1], eps=1e-6)
        super().__init__(stages, dims, strides, norm, in_chans=in_chans, global_pool=global_pool, **kwargs)
        self.apply(init_weights)
        # The authors count blocks and reductions from the first stage to the last.
        names = []
        for i, depth in enumerate(depths):
            names += [f"stages.{i}.downsample."] if i else []
            names += [f"stages.{i}.blocks.{j}." for j in range(depth)]
        self.renames = (*((rf"^blocks\.{number}\.", name) for number, name in enumerate(names)), *self.renames)

    def reset_pool(self, global_pool: str) -> None:
        self.global_pool = plain.TokenPool(global_pool, self.extra)

    def finish(self, x: tuple[Tensor, tuple[int, int]]) -> Tensor:
        """Return the final tokens (B, E + H * W, C)."""
        return self.norm(x[0])

    def stage_map(self, x: tuple[Tensor, tuple[int, int]], norm: bool) -> Tensor:
        tokens, size = x
        tokens = self.norm(tokens) if norm else tokens
        return to_channels_last(tokens[:, self.extra :].transpose(1, 2).unflatten(2, size))


# The searched sizes, from the authors' scripts; `reftiny` is not searched.
LAYOUTS = {
    "nano": (Layout(32, 32, (1, 1), (128, 128)), Layout(64, 32, (2,), (256,)), Layout(128, 32, (4,), (512,))),
    "tiny": (
        Layout(176, 32, (3, 3, 3, 4, 4), (704, 576, 640, 576, 704)),
        Layout(352, 48, (10, 8, 8, 8, 10, 10), (1408, 1408, 1280, 1408, 1280, 1024)),
        Layout(704, 64, (10, 10, 10, 8, 8), (2560, 1792, 2816, 2816, 2560)),
    ),
    "small": (
        Layout(220, 32, (5, 5, 7, 5, 5, 5), (880, 880, 800, 720, 720, 720)),
        Layout(440, 48, (10, 10, 10, 10, 12, 12), (1760, 1440, 1920, 1600, 1600, 1440)),
        Layout(880, 64, (16, 12, 16, 12, 14), (3200, 3200, 2880, 2240, 2560)),
    ),
    "medium": (
        Layout(240, 32, (7, 6, 7, 8, 7, 8, 6), (960, 960, 800, 960, 880, 880, 800)),
        Layout(640, 48, (10, 14, 14, 16, 14, 16, 16), (1120, 1760, 1920, 1760, 1440, 1760, 1920)),
        Layout(880, 64, (16, 10, 16, 12, 16, 14), (3200, 3840, 3840, 3200, 3520, 3520)),
    ),
    "reftiny": (
        Layout(192, 64, (3,) * 4, (768,) * 4),
        Layout(384, 64, (6,) * 4, (1536,) * 4),
        Layout(768, 64, (12,) * 4, (3072,) * 4),
    ),
    "tiny666": (
        Layout(176, 64, (2,) * 6, (576, 704, 512, 640, 640, 640)),
        Layout(352, 64, (4, 6, 8, 4, 6), (1280, 1024, 1280, 1536, 1408)),
        Layout(704, 64, (8, 12, 6, 8, 10), (2560, 2816, 3072, 2304, 2560)),
    ),
}
_CFG: Any = {"pool_size": None, "fixed_input_size": True}
default_cfgs = generate_default_cfgs(
    {
        f"vit_resnas_{size}": imagenet_cfg(first_conv="stages.0.downsample.convs.0.conv", **_CFG)
        for size in ("nano", "tiny", "small", "medium", "reftiny")
    }
    | {"vit_resnas_tiny666": imagenet_cfg(first_conv="stages.0.downsample.proj", **_CFG)}
)


@register_model
def vit_resnas_nano(pretrained: bool = False, **kwargs) -> ViTResNAS:
    """Return a small net of our own for small images and CPUs; 56 pixels give maps of 4, 2 and 1 tokens a side."""
    return ViTResNAS.build("vit_resnas_nano", pretrained, **{"layouts": LAYOUTS["nano"]} | kwargs)


@register_model
def vit_resnas_tiny(pretrained: bool = False, **kwargs) -> ViTResNAS:
    return ViTResNAS.build("vit_resnas_tiny", pretrained, **{"layouts": LAYOUTS["tiny"]} | kwargs)


@register_model
def vit_resnas_small(pretrained: bool = False, **kwargs) -> ViTResNAS:
    return ViTResNAS.build("vit_resnas_small", pretrained, **{"layouts": LAYOUTS["small"]} | kwargs)


@register_model
def vit_resnas_medium(pretrained: bool = False, **kwargs) -> ViTResNAS:
    return ViTResNAS.build("vit_resnas_medium", pretrained, **{"layouts": LAYOUTS["medium"]} | kwargs)


@register_model
def vit_resnas_reftiny(pretrained: bool = False, **kwargs) -> ViTResNAS:
    return ViTResNAS.build("vit_resnas_reftiny", pretrained, **{"layouts": LAYOUTS["reftiny"]} | kwargs)


@register_model
def vit_resnas_tiny666(pretrained: bool = False, **kwargs) -> ViTResNAS:
    return ViTResNAS.build("vit_resnas_tiny666", pretrained, **{"layouts": LAYOUTS["tiny666"], "stem": 0} | kwargs)
