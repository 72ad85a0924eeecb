"""CoSwin: Convolution Enhanced Hierarchical Shifted Window Attention For Small-Scale Vision (arXiv:2509.08959).

By the paper's abstract and a summary (Khadka et al., 2025); the authors' repository, puskal-khadka/coswin, could not be
read. Swin's layout and the place of the convolution, inside the attention block, are known; the sizes, for images of 28
to 64 pixels, are ours. Swin's weights load with `strict=False`.
"""

from collections.abc import Sequence

from timm.models import generate_default_cfgs, register_model

from models.backbones.swin import Swin
from models.hierarchical import imagenet_cfg
from ops.registry import Spec


class CoSwin(Swin):
    """Swin with a convolution beside the attention of each window.

    Args:
        depths: Number of blocks in each stage.
        window: Side of a window.
        patch: Side of a patch of the stem, in pixels.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: as above, with a batch norm.
        **kwargs: Further arguments of `Swin`.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        window: int = 4,
        patch: int = 2,
        mixers: Spec | Sequence | None = None,
        **kwargs,
    ):
        default = {"name": "conv_enhanced_window", "window": window, "batch_norm": True}
        super().__init__(depths=depths, patch=patch, mixers=default if mixers is None else mixers, **kwargs)


default_cfgs = generate_default_cfgs(
    {"coswin_nano": imagenet_cfg(input_size=(3, 32, 32), pool_size=(2, 2)), "coswin_tiny": imagenet_cfg()}
)


@register_model
def coswin_nano(pretrained: bool = False, **kwargs) -> CoSwin:
    """Return a small net for CPUs; 32 pixels give maps of 16, 8, 4 and 2 tokens a side."""
    arguments = {"dim": 32, "depths": (2, 2, 2, 2), "heads": (1, 2, 4, 8)}
    return CoSwin.build("coswin_nano", pretrained, **arguments | kwargs)


@register_model
def coswin_tiny(pretrained: bool = False, **kwargs) -> CoSwin:
    return CoSwin.build("coswin_tiny", pretrained, **kwargs)
