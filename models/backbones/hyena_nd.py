"""Hyena N-D in DeiT's layout (Zimerman and Wolf, AISTATS 2024, arXiv:2309.13600).

Paper: Multi-Dimensional Hyena for Spatial Inductive Bias. Written after the paper and the authors' repository,
Itamarzimm/HyenaND (Apache-2.0); its checkpoints load.
"""

from collections.abc import Sequence

from timm.models import generate_default_cfgs, register_model

from models.backbones.deit import DeiT, deit_cfg
from models.layers.position import grid_of
from models.plain import TokenPool
from ops.registry import Spec

METHODS = ("hyena2d", "hyena2dattn", "attnhyena2d", "onebyone")


class HyenaND(DeiT):
    """ViT's layout with long convolutions in place of attention, without a class token.

    Args:
        img_size: Size, in pixels, of the images that positions are learned for.
        patch: Side of a patch in pixels.
        depths: Number of blocks, as one entry.
        method: Which blocks have which op, under the authors' names. "hyena2d" (default): all Hyena. "hyena2dattn":
            attention in the blocks after the middle one, "attnhyena2d": attention up to the middle one, "onebyone":
            attention in every second block.
        filter: Form of the filters, as in op `hyena`.
        direction: Directions of the long convolutions, as in op `hyena`.
        window: Window of the filters, as in op `hyena`.
        order: Number of products in op `hyena`.
        mixers: Token mixers in place of all of these, as `ops.parse_mixers` reads them.
        global_pool: What the classifier reads: "first" (default) the first patch's token, as in the authors' code,
            "avg" the mean of all tokens.
        **kwargs: Further arguments of `PlainBackbone`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch: int = 16,
        depths: Sequence[int] = (12,),
        method: str = "hyena2d",
        filter: str = "joint",
        direction: str = "seq",
        window: str = "standard",
        order: int = 2,
        mixers: Spec | Sequence | None = None,
        global_pool: str = "first",
        **kwargs,
    ):
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
        if mixers is None:
            size = max(grid_of(img_size, patch))
            hyena = {"name": "hyena", "size": size, "order": order, "filter": filter, "window": window}
            hyena["direction"] = direction
            places = range(depths[0])
            attention = {
                "hyena2d": [False for _ in places],
                "hyena2dattn": [i > depths[0] // 2 for i in places],
                "attnhyena2d": [i <= depths[0] // 2 for i in places],
                "onebyone": [i % 2 == 1 for i in places],
            }
            mixers = [["full" if is_attention else hyena for is_attention in attention[method]]]
        super().__init__(
            img_size=img_size,
            patch=patch,
            depths=depths,
            mixers=mixers,
            class_token=False,
            global_pool=global_pool,
            **kwargs,
        )

    def reset_pool(self, global_pool: str) -> None:
        if global_pool == "first":
            self.global_pool = TokenPool("token", 1)
        else:
            super().reset_pool(global_pool)


default_cfgs = generate_default_cfgs({f"hyena_deit_{size}": deit_cfg("") for size in ("tiny", "small", "base")})


@register_model
def hyena_deit_tiny(pretrained: bool = False, **kwargs) -> HyenaND:
    return HyenaND.build("hyena_deit_tiny", pretrained, **{"dim": 192, "heads": 3} | kwargs)


@register_model
def hyena_deit_small(pretrained: bool = False, **kwargs) -> HyenaND:
    return HyenaND.build("hyena_deit_small", pretrained, **{"dim": 384, "heads": 6} | kwargs)


@register_model
def hyena_deit_base(pretrained: bool = False, **kwargs) -> HyenaND:
    return HyenaND.build("hyena_deit_base", pretrained, **kwargs)
