"""EViT: Expediting Vision Transformers via Token Reorganizations (Liang et al., ICLR 2022, arXiv:2202.07800).

Paper: Not All Patches Are What You Need. Written after the paper and the authors' repository, youweiliang/evit
(Apache-2.0); its checkpoints load. The repository lacks the paper's nets in LV-ViT's layout: these drop tokens before a
quarter, a half and three quarters of their depth, as the others do. Training begins with all tokens in the paper; here
a net keeps its share from the start.
"""

from collections.abc import Sequence

from timm.models import generate_default_cfgs, register_model

from models.backbones.deit import DeiT, deit_cfg
from models.backbones.lvvit import MEDIUM, SMALL, LVViT, lvvit_cfg
from models.reduction import insert_reduction


class EViT(DeiT):
    """DeiT whose tokens become fewer with depth, by `models/reduction/evit.py`.

    Args:
        keep: Share of the map's tokens that each block of `reduce_at` keeps, above 0 and at most 1.
        fuse: Fuse the other tokens to one token.
        reduce_at: Indices of the blocks that reduce tokens. By default those before a quarter, a half and three
            quarters of the depth, which are 3, 6 and 9 in the paper's nets.
        depths: As in `PlainBackbone`.
        **kwargs: Further arguments of `DeiT`; from the first block that reduces tokens on, the ops must be "full".

    Raises:
        ValueError: `keep` is out of its range, or a block of `reduce_at` does not exist or has another op.
    """

    def __init__(
        self,
        keep: float = 0.7,
        fuse: bool = True,
        reduce_at: Sequence[int] | None = None,
        depths: Sequence[int] = (12,),
        **kwargs,
    ):
        super().__init__(depths=depths, **kwargs)
        insert_reduction(self, {"name": "evit", "keep": keep, "fuse": fuse, "reduce_at": reduce_at})


class EViTLVViT(EViT, LVViT):
    """LV-ViT whose tokens become fewer with depth."""


default_cfgs = generate_default_cfgs(
    {f"evit_{size}": deit_cfg("") for size in ("small", "base")}
    | {f"evit_lvvit_{size}": lvvit_cfg() for size in ("small", "medium")}
)


@register_model
def evit_small(pretrained: bool = False, **kwargs) -> EViT:
    return EViT.build("evit_small", pretrained, **{"dim": 384, "heads": 6} | kwargs)


@register_model
def evit_base(pretrained: bool = False, **kwargs) -> EViT:
    return EViT.build("evit_base", pretrained, **kwargs)


@register_model
def evit_lvvit_small(pretrained: bool = False, **kwargs) -> EViTLVViT:
    return EViTLVViT.build("evit_lvvit_small", pretrained, **SMALL | kwargs)


@register_model
def evit_lvvit_medium(pretrained: bool = False, **kwargs) -> EViTLVViT:
    return EViTLVViT.build("evit_lvvit_medium", pretrained, **MEDIUM | kwargs)
