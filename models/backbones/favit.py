"""FaViT (Qin et al., TNNLS 2023, arXiv:2312.08614).

Paper: Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost. Written after the paper
and what the authors' repository, q2479036243/FaViT, computes. The repository names no licence, so none of its code is
here. Checkpoints under the authors' names load; none is released.
"""

from collections.abc import Sequence

from timm.models import generate_default_cfgs, register_model
from torch import nn

from models.hierarchical import HierarchicalBackbone, imagenet_cfg, stage_layout
from models.layers.pvt_v2 import RENAMES, Block, DepthwiseMlp, NormedStage, init_conv
from ops import create_ops, parse_mixers
from ops.registry import Spec


class FaViT(HierarchicalBackbone):
    """PVTv2's layout with factorization self-attention.

    Patches overlap, and a norm ends each stage: the next stage and a detector both read the normed map.

    Args:
        dim: Number of channels of the first stage; every further stage has twice as many.
        depths: Number of blocks in each stage.
        heads: Number of attention heads in each stage.
        mlp_ratios: Width of the MLP in each stage, relative to the channels.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: factorization.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    renames = RENAMES

    def __init__(
        self,
        dim: int = 64,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[int] = (8, 6, 4, 4),
        mixers: Spec | Sequence = "factorization",
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        specs = parse_mixers(mixers, depths)
        dims, strides, rates = stage_layout(dim, depths, drop_path_rate)
        stages = []
        for i, width in enumerate(dims):
            ops, contexts = create_ops(specs[i], width, heads[i], stage=i, stride=strides[i])
            blocks = [
                Block(width, op, DepthwiseMlp(width, mlp_ratios[i] * width), rate)
                for op, rate in zip(ops, rates[i], strict=True)
            ]
            stages.append(NormedStage(dims[i - 1] if i else in_chans, width, i == 0, blocks, contexts))
        super().__init__(stages, dims, strides, nn.Identity(), in_chans=in_chans, **kwargs)
        self.apply(init_conv)


default_cfgs = generate_default_cfgs({f"favit_b{size}": imagenet_cfg() for size in range(4)})


@register_model
def favit_b0(pretrained: bool = False, **kwargs) -> FaViT:
    return FaViT.build("favit_b0", pretrained, **{"dim": 32} | kwargs)


@register_model
def favit_b1(pretrained: bool = False, **kwargs) -> FaViT:
    return FaViT.build("favit_b1", pretrained, **kwargs)


@register_model
def favit_b2(pretrained: bool = False, **kwargs) -> FaViT:
    return FaViT.build("favit_b2", pretrained, **{"depths": (2, 3, 18, 3)} | kwargs)


@register_model
def favit_b3(pretrained: bool = False, **kwargs) -> FaViT:
    return FaViT.build("favit_b3", pretrained, **{"dim": 96, "depths": (2, 3, 14, 3)} | kwargs)
