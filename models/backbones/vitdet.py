"""ViTDet: Exploring Plain Vision Transformer Backbones for Object Detection (Li et al., ECCV 2022, arXiv:2203.16527).

Written after the paper and the authors' repository, facebookresearch/detectron2 (Apache-2.0); its checkpoints load into
dense features, without the convolutions of the feature pyramid's outputs. The pyramid is `models.pyramid`. Weights of
plain ViTs without relative positions load too.
"""

import re
from collections.abc import Sequence

from timm.models import generate_default_cfgs, register_model

from models.backbones.deit import DeiT, deit_cfg
from ops.registry import Spec


class ViTDet(DeiT):
    """ViT whose blocks attend in windows, except the last of each quarter, and which has relative positions.

    The net has no class token; the position of a class token in a file is left out.

    Args:
        depths: As in `PlainBackbone`.
        window: Side of a window in tokens.
        map_size: Side of the map that the relative positions of the other blocks are learned for.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: the op "decomposed_position".
        **kwargs: Further arguments of `PlainBackbone`.
    """

    def __init__(
        self,
        depths: Sequence[int] = (12,),
        window: int = 14,
        map_size: int = 64,
        mixers: Spec | Sequence | None = None,
        **kwargs,
    ):
        if mixers is None:
            whole = {"name": "decomposed_position", "size": map_size}
            in_windows = {"name": "decomposed_position", "window": window}
            last = {depths[0] * quarter // 4 - 1 for quarter in (1, 2, 3, 4)}
            mixers = [[whole if i in last else in_windows for i in range(depths[0])]]
        super().__init__(depths=depths, mixers=mixers, **kwargs)

    @property
    def optional_weights(self) -> set[str]:
        """Names of the relative positions, which checkpoints of plain ViTs lack."""
        return {name for name in self.state_dict() if re.search(r"\.rel_pos_[hw]$", name)}


default_cfgs = generate_default_cfgs(
    {f"vitdet_{size}": deit_cfg("", fixed_input_size=False) for size in ("base", "large", "huge")}
)


@register_model
def vitdet_base(pretrained: bool = False, **kwargs) -> ViTDet:
    return ViTDet.build("vitdet_base", pretrained, **kwargs)


@register_model
def vitdet_large(pretrained: bool = False, **kwargs) -> ViTDet:
    return ViTDet.build("vitdet_large", pretrained, **{"dim": 1024, "depths": (24,), "heads": 16} | kwargs)


@register_model
def vitdet_huge(pretrained: bool = False, **kwargs) -> ViTDet:
    return ViTDet.build("vitdet_huge", pretrained, **{"dim": 1280, "depths": (32,), "heads": 16} | kwargs)
