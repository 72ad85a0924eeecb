"""TransNeXt: Robust Foveal Visual Perception for Vision Transformers (Shi, CVPR 2024, arXiv:2311.17132).

Written after the paper and the author's repository, DaiShiResearch/TransNeXt (Apache-2.0), whose checkpoints load. The
repository's CUDA kernels are not used.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.hierarchical import HierarchicalBackbone, imagenet_cfg, stage_layout
from models.layers.pvt_v2 import RENAMES, Block, NormedStage, init_conv
from ops import create_ops, parse_mixers
from ops.registry import Spec


class ConvGLU(nn.Module):
    """Gated MLP on (B, H, W, C) whose gates read each token's 3 x 3 neighbourhood.

    The hidden width is 2/3 of that of a plain MLP of the same ratio, so that both cost about the same.
    """

    renames = ((r"^dwconv\.dwconv\.", "dwconv."),)

    def __init__(self, dim: int, mlp_ratio: int):
        super().__init__()
        hidden = 2 * mlp_ratio * dim // 3
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        gate = self.dwconv(gate.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(gate) * value)


class TransNeXt(HierarchicalBackbone):
    """PVTv2's layout with aggregated attention and gated MLPs.

    Args:
        dim: Number of channels of the first stage; every further stage has twice as many.
        depths: Number of blocks in each stage.
        heads: Number of attention heads in each stage.
        pools: For each stage the side of the map relative to the side of the pooled map. At 1 the stage has
            length-scaled cosine attention to all tokens.
        pretrain_size: Side in pixels of the images that the weights were trained on, as in the paper's ops.
        bias_size: Side in pixels of the images that position biases are computed for, as in the paper's ops. The
            author's dense nets have the size of the crops here, or None for extrapolation.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: as above.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    renames = RENAMES

    def __init__(
        self,
        dim: int = 72,
        depths: Sequence[int] = (2, 2, 15, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        pools: Sequence[int] = (8, 4, 2, 1),
        pretrain_size: int = 224,
        bias_size: int | None = None,
        mixers: Spec | Sequence | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        if mixers is None:
            mixers = transnext_mixers(pools, pretrain_size, bias_size)
        specs = parse_mixers(mixers, depths)
        dims, strides, rates = stage_layout(dim, depths, drop_path_rate)
        stages = []
        for i, width in enumerate(dims):
            ops, contexts = create_ops(specs[i], width, heads[i], stage=i, stride=strides[i])
            blocks = [
                Block(width, op, ConvGLU(width, 8 if i < 2 else 4), rate)
                for op, rate in zip(ops, rates[i], strict=True)
            ]
            stages.append(NormedStage(dims[i - 1] if i else in_chans, width, i == 0, blocks, contexts))
        super().__init__(stages, dims, strides, nn.Identity(), in_chans=in_chans, **kwargs)
        self.apply(init_conv)


def transnext_mixers(pools: Sequence[int], pretrain_size: int, bias_size: int | None) -> list[dict[str, Any]]:
    """Return the op of each stage; the arguments are those of `TransNeXt`."""
    sizes = {"pretrain_size": pretrain_size, "bias_size": bias_size}
    full = {"name": "length_scaled_cosine", **sizes}
    return [{"name": "aggregated", "pool": pool, **sizes} if pool > 1 else full for pool in pools]


def _url(name: str) -> str:
    return f"https://huggingface.co/DaiShiResearch/{name}/resolve/main/{name.replace('-', '_')}.pth"


default_cfgs = generate_default_cfgs(
    {
        f"transnext_{size}.in1k": imagenet_cfg(_url(f"transnext-{size}-224-1k"))
        for size in ("micro", "tiny", "small", "base")
    }
    | {
        f"transnext_{size}.in1k_384": imagenet_cfg(
            _url(f"transnext-{size}-384-1k-ft-1k"), input_size=(3, 384, 384), pool_size=(12, 12)
        )
        for size in ("small", "base")
    }
    | {
        "transnext_micro_aaaa.in1k_256": imagenet_cfg(
            _url("transnext-micro-AAAA-256-1k"), input_size=(3, 256, 256), pool_size=(8, 8)
        )
    }
)

MICRO = {"dim": 48, "heads": (2, 4, 8, 16)}


@register_model
def transnext_micro(pretrained: bool = False, **kwargs) -> TransNeXt:
    return TransNeXt.build("transnext_micro", pretrained, **MICRO | kwargs)


@register_model
def transnext_micro_aaaa(pretrained: bool = False, **kwargs) -> TransNeXt:
    """Build a net with aggregated attention in all stages, trained on images of 256 pixels."""
    arguments = {**MICRO, "pools": (16, 8, 4, 2), "pretrain_size": 256}
    return TransNeXt.build("transnext_micro_aaaa", pretrained, **arguments | kwargs)


@register_model
def transnext_tiny(pretrained: bool = False, **kwargs) -> TransNeXt:
    return TransNeXt.build("transnext_tiny", pretrained, **kwargs)


@register_model
def transnext_small(pretrained: bool = False, **kwargs) -> TransNeXt:
    return TransNeXt.build("transnext_small", pretrained, **{"depths": (5, 5, 22, 5)} | kwargs)


@register_model
def transnext_base(pretrained: bool = False, **kwargs) -> TransNeXt:
    arguments = {"dim": 96, "depths": (5, 5, 23, 5), "heads": (4, 8, 16, 32)}
    return TransNeXt.build("transnext_base", pretrained, **arguments | kwargs)
