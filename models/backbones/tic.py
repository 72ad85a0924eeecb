"""TiC: Exploring Vision Transformer in Convolution (Zhang et al., arXiv:2310.04134).

By the paper's text: the authors' repository, zs670980918/MSA-Conv, holds the operator only. The forms of the
multi-directional cyclic shift and of inter-pooling are not known, so this net lacks both. The layout is Swin's, and the
sizes are ours.
"""

from collections.abc import Sequence

from timm.models import generate_default_cfgs, register_model

from models.backbones.swin import Swin
from models.hierarchical import imagenet_cfg
from ops.registry import Spec


class TiC(Swin):
    """Swin's pyramid with attention inside convolution windows.

    Args:
        kernel: Side of a window and of the convolution that follows, odd.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: MSA-Conv.
        **kwargs: Further arguments of `Swin`.
    """

    def __init__(
        self, depths: Sequence[int] = (2, 2, 6, 2), kernel: int = 3, mixers: Spec | Sequence | None = None, **kwargs
    ):
        default = {"name": "msa_conv", "kernel": kernel, "dropout": 0.1}
        super().__init__(depths=depths, mixers=default if mixers is None else mixers, **kwargs)


default_cfgs = generate_default_cfgs(
    {"tic_nano": imagenet_cfg(input_size=(3, 32, 32), pool_size=(2, 2)), "tic_tiny": imagenet_cfg()}
)


@register_model
def tic_nano(pretrained: bool = False, **kwargs) -> TiC:
    """Return a small net for small images and CPUs; 32 pixels give maps of 16, 8, 4 and 2 tokens a side."""
    arguments = {"dim": 32, "depths": (2, 2, 2, 2), "heads": (1, 2, 4, 8), "patch": 2}
    return TiC.build("tic_nano", pretrained, **arguments | kwargs)


@register_model
def tic_tiny(pretrained: bool = False, **kwargs) -> TiC:
    """Return a net of Swin-T's depths with two thirds of its channels."""
    return TiC.build("tic_tiny", pretrained, **{"dim": 64, "heads": (2, 4, 8, 16)} | kwargs)
