"""MoH-ViT: TransNeXt with mixture-of-head attention (Jin et al., ICML 2025, arXiv:2410.11842).

Paper: MoH: Multi-Head Attention as Mixture-of-Head Attention. Written after the paper and the authors' repository,
SkyworkAI/MoH (Apache-2.0); its checkpoints load. In nets of another layout the op is `model.mixers=mixture_of_heads`.
"""

from collections.abc import Sequence

from timm.models import generate_default_cfgs, register_model

from models.backbones.transnext import TransNeXt, transnext_mixers
from models.hierarchical import imagenet_cfg
from ops.registry import Spec


class MoH(TransNeXt):
    """TransNeXt whose tokens weight the heads of their attention.

    Args:
        shared: Number of heads in each stage that always count.
        routed: Number of further heads in each stage that each token chooses.
        depths: As in `TransNeXt`.
        pools: As in `TransNeXt`.
        pretrain_size: As in `TransNeXt`.
        bias_size: As in `TransNeXt`.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: TransNeXt's, with weighted heads.
        **kwargs: Further arguments of `TransNeXt`.
    """

    def __init__(
        self,
        shared: Sequence[int] = (3, 6, 3, 4),
        routed: Sequence[int] = (0, 0, 6, 12),
        depths: Sequence[int] = (5, 5, 22, 5),
        pools: Sequence[int] = (8, 4, 2, 1),
        pretrain_size: int = 224,
        bias_size: int | None = None,
        mixers: Spec | Sequence | None = None,
        **kwargs,
    ):
        if mixers is None:
            mixers = [
                {"name": "mixture_of_heads", "of": of, "shared": always, "routed": chosen}
                for of, always, chosen in zip(
                    transnext_mixers(pools, pretrain_size, bias_size), shared, routed, strict=True
                )
            ]
        super().__init__(depths=depths, mixers=mixers, **kwargs)


default_cfgs = generate_default_cfgs(
    {f"moh_transnext_{name}": imagenet_cfg() for name in ("small_75", "small_80", "base_50", "base_75")}
    | {"moh_nano": imagenet_cfg(input_size=(3, 32, 32), pool_size=(1, 1))}
)

BASE = {"dim": 96, "depths": (5, 5, 23, 5), "heads": (4, 8, 16, 32)}


@register_model
def moh_nano(pretrained: bool = False, **kwargs) -> MoH:
    """Return a small net of our own for small images and CPUs."""
    arguments = {
        "dim": 24,
        "depths": (1, 1, 2, 1),
        "heads": (1, 2, 4, 8),
        "shared": (1, 2, 1, 2),
        "routed": (0, 0, 2, 4),
    }
    return MoH.build("moh_nano", pretrained, **arguments | kwargs)


@register_model
def moh_transnext_small_75(pretrained: bool = False, **kwargs) -> MoH:
    return MoH.build("moh_transnext_small_75", pretrained, **kwargs)


@register_model
def moh_transnext_small_80(pretrained: bool = False, **kwargs) -> MoH:
    return MoH.build("moh_transnext_small_80", pretrained, **{"shared": (3, 6, 3, 8)} | kwargs)


@register_model
def moh_transnext_base_50(pretrained: bool = False, **kwargs) -> MoH:
    arguments = {**BASE, "shared": (2, 2, 2, 4), "routed": (2, 4, 6, 8)}
    return MoH.build("moh_transnext_base_50", pretrained, **arguments | kwargs)


@register_model
def moh_transnext_base_75(pretrained: bool = False, **kwargs) -> MoH:
    arguments = {**BASE, "shared": (4, 8, 4, 5), "routed": (0, 0, 8, 16)}
    return MoH.build("moh_transnext_base_75", pretrained, **arguments | kwargs)
