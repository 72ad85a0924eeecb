"""MOAT: Alternating Mobile Convolution and Attention Brings Strong Vision Models (Yang et al., ICLR 2023).

The paper is arXiv:2210.01820. Written after the paper and the authors' repository, google-research/deeplab2
(Apache-2.0). Weights under the authors' names in PyTorch's layout load; the authors released TensorFlow checkpoints,
which must be converted to that layout first.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, stage_layout
from models.layers.conv import HalvingConv2d
from models.layers.mbconv import hybrid_block_name, hybrid_mixers, mbconv
from models.layers.pool import NormedPool
from ops import create_op, create_ops
from ops.registry import Place, Spec

# Channels of an attention head
HEAD_DIM = 32


class MOATBlock(nn.Module):
    """Inverted bottleneck and token mixing, each with a residual connection, on maps (B, C, H, W).

    Args:
        conv: Inverted bottleneck, which changes the map to `dim` channels and reduces it if it has a stride.
        dim: Number of channels of the result.
        mixer: Token mixer.
        drop_path: Drop path rate of the mixer.
    """

    def __init__(self, conv: nn.Module, dim: int, mixer: nn.Module, drop_path: float):
        super().__init__()
        self.conv = conv
        self.norm = nn.LayerNorm(dim)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **context) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        return (x + self.drop_path(self.mixer(self.norm(x), **context))).permute(0, 3, 1, 2)


class MOAT(HierarchicalBackbone):
    """Stem, two stages of inverted bottlenecks and two of MOAT blocks; a block with a stride begins each stage.

    Args:
        dims: Number of channels of each stage, or of the first stage if every further stage has twice as many.
        depths: Number of blocks in each stage after the one with a stride. The paper counts that one, too.
        stem: Number of channels of the stem; by default as many as the first stage has.
        stem_stride: Stride of the stem, 1 or 2.
        positions: Learn relative positions, for maps of 14 and 7 tokens a side in the last two stages; they are
            interpolated to other maps.
        pool: Side of the squares that the shortcuts of strided blocks average. The authors' classifiers have 2, their
            dense nets 3.
        mixers: Token mixers of the blocks, as `ops.parse_mixers` reads them; the entry None makes a stage of inverted
            bottlenecks. Default: as above. The block with a stride in a stage of mixers has the paper's attention.
        in_chans: Number of channels of the images.
        drop_path_rate: Limit of the drop path rates, which rise linearly with the block's index, from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    out_indices = (1, 2, 3, 4)
    renames = (
        (r"^conv_0\.", "stages.0.downsample.0."),
        (r"^norm_0\.", "stages.0.downsample.1."),
        (r"^conv_1\.", "stages.0.downsample.3."),
        (r"^moat\.final_layer_norm\.", "global_pool.norm."),
        (r"^moat\.logits_head\.", "head."),
        (r"^moat\.block_(\d\d)_(\d\d)\.", lambda match: hybrid_block_name(int(match[1]), int(match[2]))),
        (r"\.attention_norm\.", ".norm."),
        (r"\.attention\.o\.", ".mixer.proj."),
        (r"\.attention\.qkv\.", ".mixer.qkv."),
        (r"\.attention\.relative_position_embedding$", ".mixer.relative_position_bias_table"),
        (r"\.expand_conv\.", ".conv1_1x1."),
        (r"\.expand_norm\.", ".norm1."),
        (r"\.depthwise_conv\.", ".conv2_kxk."),
        (r"\.depthwise_norm\.", ".norm2."),
        (r"\.se\.reduce_conv2d\.", ".se.fc1."),
        (r"\.se\.expand_conv2d\.", ".se.fc2."),
        (r"\.shrink_conv\.", ".conv3_1x1."),
        (r"\.shortcut_conv\.", ".shortcut.expand."),
        (r"^(stages\.[34]\.(?:downsample|blocks\.\d+)\.)(?=pre_norm|conv\d_|norm\d|shortcut)", r"\1conv."),
    )

    def __init__(
        self,
        dims: int | Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (1, 2, 6, 1),
        stem: int | None = None,
        stem_stride: int = 2,
        positions: bool = True,
        pool: int = 2,
        mixers: Spec | Sequence | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        dims, strides, _ = stage_layout(dims, depths, 0.0, 2 * stem_stride)
        attention: Any = {"name": "relative_conv_attention"} | ({} if positions else {"size": 0})
        specs = hybrid_mixers(mixers, (None, None, attention, attention), depths)
        total = sum(depths) + len(depths)
        rates = (drop_path_rate * i / total for i in range(total))
        settings: Any = {"pool": pool, "padding": "same", "norm_eps": 1e-3}
        stem = dims[0] if stem is None else stem
        layers = (
            HalvingConv2d(in_chans, stem) if stem_stride == 2 else nn.Conv2d(in_chans, stem, 3, padding=1),
            nn.BatchNorm2d(stem, eps=1e-3),
            nn.GELU(),
            nn.Conv2d(stem, stem, 3, padding=1),
        )
        stages = [Stage(nn.Sequential(*layers), ())]
        for i, dim in enumerate(dims):
            in_dim = dims[i - 1] if i else stem
            stage_specs, contexts = specs[i], []
            ops: list[nn.Module | None] = [None] * (1 + depths[i])
            if stage_specs is not None:
                first = create_op(attention, dim, dim // HEAD_DIM, place=Place(i, 0, depths[i], strides[i]))
                others, contexts = create_ops(stage_specs, dim, dim // HEAD_DIM, stage=i, stride=strides[i])
                ops = [first, *others]
            blocks = []
            for j, op in enumerate(ops):
                rate = next(rates)
                squeeze = "se" if op is None else ""
                conv = mbconv(dim if j else in_dim, dim, 1 if j else 2, rate, attn_layer=squeeze, **settings)
                blocks.append(conv if op is None else MOATBlock(conv, dim, op, rate))
            stages.append(Stage(blocks[0], blocks[1:], contexts))
        super().__init__(stages, [stem, *dims], [stem_stride, *strides], nn.Identity(), in_chans=in_chans, **kwargs)
        self.apply(init_moat)

    def reset_pool(self, global_pool: str) -> None:
        if global_pool:
            self.global_pool = NormedPool(global_pool, self.num_features, eps=1e-5)
        else:
            super().reset_pool(global_pool)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the authors' weights, and join the projections to queries, keys and values."""
        joined = {}
        for key, value in state.items():
            part = re.search(r"\.attention\.([qkv])\.", key)
            if part is None:
                joined[key] = value
            elif part[1] == "q":
                names = [key.replace(part[0], f".attention.{name}.") for name in "qkv"]
                joined[key.replace(part[0], ".attention.qkv.")] = torch.cat([state[name] for name in names])
        return super().checkpoint_filter(joined)


def init_moat(module: nn.Module) -> None:
    """Initialise a layer as the authors do; for `nn.Module.apply`.

    Weights: normal of standard deviation 0.02. Bias: 0. The averages of batch norms change by 1 % per step.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        module.momentum = 0.01


_CENTRED: Any = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
default_cfgs = generate_default_cfgs(
    {f"moat_{i}": imagenet_cfg() for i in range(2)}
    | {"moat_2": imagenet_cfg(input_size=(3, 384, 384), pool_size=(12, 12), **_CENTRED)}
    | {f"moat_{i}": imagenet_cfg(input_size=(3, 512, 512), pool_size=(16, 16), **_CENTRED) for i in (3, 4)}
    | {f"tiny_moat_{i}": imagenet_cfg(input_size=(3, 256, 256), pool_size=(8, 8)) for i in range(4)}
    | {"moat_nano": imagenet_cfg(input_size=(3, 32, 32), pool_size=(2, 2))}
)


@register_model
def moat_nano(pretrained: bool = False, **kwargs) -> MOAT:
    """Return a small net of our own for small images and CPUs; 32 pixels give maps of 16, 8, 4 and 2 tokens a side."""
    arguments = {"dims": (32, 64, 128, 256), "depths": (1, 1, 1, 1), "stem_stride": 1}
    return MOAT.build("moat_nano", pretrained, **arguments | kwargs)


@register_model
def tiny_moat_0(pretrained: bool = False, **kwargs) -> MOAT:
    return MOAT.build("tiny_moat_0", pretrained, **{"dims": 32} | kwargs)


@register_model
def tiny_moat_1(pretrained: bool = False, **kwargs) -> MOAT:
    return MOAT.build("tiny_moat_1", pretrained, **{"dims": 40} | kwargs)


@register_model
def tiny_moat_2(pretrained: bool = False, **kwargs) -> MOAT:
    return MOAT.build("tiny_moat_2", pretrained, **{"dims": 56} | kwargs)


@register_model
def tiny_moat_3(pretrained: bool = False, **kwargs) -> MOAT:
    return MOAT.build("tiny_moat_3", pretrained, **{"dims": 80} | kwargs)


@register_model
def moat_0(pretrained: bool = False, **kwargs) -> MOAT:
    return MOAT.build("moat_0", pretrained, **{"stem": 64} | kwargs)


@register_model
def moat_1(pretrained: bool = False, **kwargs) -> MOAT:
    return MOAT.build("moat_1", pretrained, **{"depths": (1, 5, 13, 1), "stem": 64} | kwargs)


@register_model
def moat_2(pretrained: bool = False, **kwargs) -> MOAT:
    return MOAT.build("moat_2", pretrained, **{"dims": 128, "depths": (1, 5, 13, 1)} | kwargs)


@register_model
def moat_3(pretrained: bool = False, **kwargs) -> MOAT:
    return MOAT.build("moat_3", pretrained, **{"dims": 160, "depths": (1, 11, 27, 1)} | kwargs)


@register_model
def moat_4(pretrained: bool = False, **kwargs) -> MOAT:
    return MOAT.build("moat_4", pretrained, **{"dims": 256, "depths": (1, 11, 27, 1)} | kwargs)
