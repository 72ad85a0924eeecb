"""InLine-DeiT, InLine-PVT, InLine-Swin and InLine-CSwin: nets with injective and local (InLine) linear attention.

Paper: Bridging the Divide: Reconsidering Softmax and Linear Attention (Han et al., NeurIPS 2024, arXiv:2412.06590).
Written after the paper and the authors' repository, LeapLabTHU/InLine (no licence of its own); its checkpoints load.
"""

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from models.backbones import swin
from models.backbones.cswin import CSWin
from models.backbones.deit import DeiT, deit_cfg
from models.backbones.pvt import PVT, pvt_cfg
from models.backbones.swin import Swin
from models.hierarchical import imagenet_cfg
from ops.attention.inline import InLineAttention
from ops.registry import Spec


class InLineSwin(Swin):
    """Swin with InLine attention in the leading blocks of each stage and shifted windows in the others.

    Args:
        depths: Number of blocks in each stage.
        inline_blocks: Number of leading blocks with InLine attention in each stage.
        window: Side of a window. Checkpoints for 224 pixels have 7, checkpoints for 384 pixels have 12.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: as above.
        **kwargs: Further arguments of `Swin`.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        inline_blocks: Sequence[int] = (2, 2, 6, 0),
        window: int = 7,
        mixers: Spec | Sequence | None = None,
        **kwargs,
    ):
        if mixers is None:
            other: Spec = {"name": "window", "window": window}
            mixers = [
                ["inline" if block < count else other for block in range(depth)]
                for count, depth in zip(inline_blocks, depths, strict=True)
            ]
        super().__init__(depths=depths, mixers=mixers, **kwargs)


class Block(swin.Block):
    """Swin's block that gives InLine attention the mean of the map before the norm.

    In CSwin's layout, the authors compute the kernels of the attention's convolution from that mean.
    """

    def forward(self, x: Tensor, **context) -> Tensor:
        if isinstance(self.mixer, InLineAttention):
            context["mean"] = x.mean((2, 3))
        return super().forward(x, **context)


class InLineCSwin(CSWin):
    """CSwin with InLine attention in the first two stages and cross-shaped windows in the others.

    Args:
        depths: Number of blocks in each stage.
        split: Width of the strips in the third stage, in tokens. Checkpoints for 384 pixels have 12.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: as above.
        **kwargs: Further arguments of `CSWin`.
    """

    block = Block

    def __init__(
        self,
        depths: Sequence[int] = (2, 4, 18, 1),
        split: int = 7,
        mixers: Spec | Sequence | None = None,
        **kwargs,
    ):
        if mixers is None:
            inline: Spec = {"name": "inline", "lepe_kernel": 3}
            mixers = [inline, inline, {"name": "cross_shaped_window", "split": split}, "cross_shaped_window"]
        super().__init__(depths=depths, mixers=mixers, **kwargs)


def _url(share: str, name: str) -> tuple[str, str]:
    return f"https://cloud.tsinghua.edu.cn/f/{share}/?dl=1", f"{name}.pth"


default_cfgs = generate_default_cfgs(
    {
        f"{name}.in1k": cfg(_url(share, name)) | args
        for name, cfg, share, args in (
            ("inline_deit_tiny", deit_cfg, "1d6b8191ad6d4114b291", {}),
            ("inline_deit_small", deit_cfg, "2f3898b07e9247f3beb3", {"input_size": (3, 288, 288)}),
            ("inline_deit_base", deit_cfg, "10bdd726d4b0435eb34e", {"input_size": (3, 448, 448)}),
            ("inline_pvt_tiny", pvt_cfg, "90ac52b1555b401eb5e6", {}),
            ("inline_pvt_small", pvt_cfg, "1ab953b2479d433080a3", {}),
            ("inline_pvt_medium", pvt_cfg, "a72aec31e6084bc0a280", {}),
            ("inline_pvt_large", pvt_cfg, "efd91318ba964f01b288", {}),
            ("inline_swin_tiny", imagenet_cfg, "32810869fcc34410966b", {}),
            ("inline_swin_small", imagenet_cfg, "e9657fd247c04c7cb1a1", {}),
            ("inline_swin_base", imagenet_cfg, "bf23564bb64c420aafe1", {}),
            ("inline_cswin_tiny", imagenet_cfg, "49fa2ecc543647c4b970", {}),
            ("inline_cswin_small", imagenet_cfg, "59f4e65f776f4052b93c", {}),
            ("inline_cswin_base", imagenet_cfg, "91e17121df284ae38521", {}),
        )
    }
)


# PVT with twice the heads, without a class token and without a norm before the classifier.
PVT_ARGS: Any = {"heads": (2, 4, 10, 16), "mixers": "inline", "class_token": False, "final_norm": False}


@register_model
def inline_deit_tiny(pretrained: bool = False, **kwargs) -> DeiT:
    arguments = {"dim": 192, "heads": 6, "mixers": "inline"}
    return DeiT.build("inline_deit_tiny", pretrained, **arguments | kwargs)


@register_model
def inline_deit_small(pretrained: bool = False, **kwargs) -> DeiT:
    """Build a net for 288 pixels that is narrower than DeiT-S."""
    arguments = {"img_size": 288, "dim": 320, "heads": 10, "mixers": "inline"}
    return DeiT.build("inline_deit_small", pretrained, **arguments | kwargs)


@register_model
def inline_deit_base(pretrained: bool = False, **kwargs) -> DeiT:
    """Build a net for 448 pixels that is as wide as DeiT-S."""
    arguments = {"img_size": 448, "dim": 384, "heads": 12, "mixers": "inline"}
    return DeiT.build("inline_deit_base", pretrained, **arguments | kwargs)


@register_model
def inline_pvt_tiny(pretrained: bool = False, **kwargs) -> PVT:
    return PVT.build("inline_pvt_tiny", pretrained, **PVT_ARGS | kwargs)


@register_model
def inline_pvt_small(pretrained: bool = False, **kwargs) -> PVT:
    return PVT.build("inline_pvt_small", pretrained, **PVT_ARGS | {"depths": (3, 4, 6, 3)} | kwargs)


@register_model
def inline_pvt_medium(pretrained: bool = False, **kwargs) -> PVT:
    return PVT.build("inline_pvt_medium", pretrained, **PVT_ARGS | {"depths": (3, 4, 18, 3)} | kwargs)


@register_model
def inline_pvt_large(pretrained: bool = False, **kwargs) -> PVT:
    return PVT.build("inline_pvt_large", pretrained, **PVT_ARGS | {"depths": (3, 8, 27, 3)} | kwargs)


@register_model
def inline_swin_tiny(pretrained: bool = False, **kwargs) -> InLineSwin:
    return InLineSwin.build("inline_swin_tiny", pretrained, **kwargs)


@register_model
def inline_swin_small(pretrained: bool = False, **kwargs) -> InLineSwin:
    arguments = {"depths": (2, 2, 18, 2), "inline_blocks": (2, 2, 0, 0)}
    return InLineSwin.build("inline_swin_small", pretrained, **arguments | kwargs)


@register_model
def inline_swin_base(pretrained: bool = False, **kwargs) -> InLineSwin:
    arguments = {"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "inline_blocks": (2, 2, 2, 0)}
    return InLineSwin.build("inline_swin_base", pretrained, **arguments | kwargs)


@register_model
def inline_cswin_tiny(pretrained: bool = False, **kwargs) -> InLineCSwin:
    return InLineCSwin.build("inline_cswin_tiny", pretrained, **kwargs)


@register_model
def inline_cswin_small(pretrained: bool = False, **kwargs) -> InLineCSwin:
    return InLineCSwin.build("inline_cswin_small", pretrained, **{"depths": (3, 6, 29, 2)} | kwargs)


@register_model
def inline_cswin_base(pretrained: bool = False, **kwargs) -> InLineCSwin:
    arguments = {"dim": 96, "depths": (3, 6, 29, 2), "heads": (4, 8, 16, 32)}
    return InLineCSwin.build("inline_cswin_base", pretrained, **arguments | kwargs)
