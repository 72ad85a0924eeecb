"""MAFormer: A Transformer Network with Multi-scale Attention Fusion for Visual Recognition (arXiv:2209.01620).

By the paper's abstract (Wang et al., Neurocomputing 2024) and the equations of a later paper that restates them; there
is no public code. All sizes, the choice of the first two stages for the fusion, the separable form of the learned
down-sampling, and the residual connection of the fusion are ours.
"""

from collections.abc import Sequence

from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from models.backbones import swin
from models.hierarchical import imagenet_cfg
from models.layers.position import grid_of
from ops.attention.multi_scale_fusion import MultiScaleFusion
from ops.registry import Spec


class Block(swin.Block):
    """Swin's block; multi-scale fusion follows the window attention and the MLP instead of standing before the MLP."""

    def forward(self, x: Tensor, **context) -> Tensor:
        if not isinstance(self.mixer, MultiScaleFusion):
            return super().forward(x, **context)
        x = x.permute(0, 2, 3, 1)
        normed = self.norm1(x)
        x = x + self.drop_path(self.mixer.local(normed))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        x = x + self.drop_path(self.mixer.fuse(x, normed))
        return x.permute(0, 3, 1, 2)


class MAFormer(swin.Swin):
    """Swin's pyramid with multi-scale attention fusion in the first two stages, and full attention in the others.

    Args:
        depths: Number of blocks in each stage.
        window: Side of a window.
        img_size: Side or (height, width) in pixels of the images that the down-sampling is learned for.
        patch: Side of a patch of the stem, in pixels.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: as above.
        **kwargs: Further arguments of `Swin`.
    """

    block = Block

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        window: int = 7,
        img_size: int | tuple[int, int] = 224,
        patch: int = 4,
        mixers: Spec | Sequence | None = None,
        **kwargs,
    ):
        if mixers is None:
            fusion = {"name": "multi_scale_fusion", "window": window}
            mixers = [*(fusion | {"size": grid_of(img_size, patch * 2**i)} for i in (0, 1)), "full", "full"]
        super().__init__(depths=depths, patch=patch, mixers=mixers, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "maformer_nano": imagenet_cfg(input_size=(3, 32, 32), pool_size=(2, 2), fixed_input_size=True),
        "maformer_tiny": imagenet_cfg(fixed_input_size=True),
    }
)


@register_model
def maformer_nano(pretrained: bool = False, **kwargs) -> MAFormer:
    """Return a small net for small images and CPUs; 32 pixels give maps of 16, 8, 4 and 2 tokens a side."""
    layout = {"dim": 32, "depths": (2, 2, 2, 2), "heads": (1, 2, 4, 8), "window": 4}
    return MAFormer.build("maformer_nano", pretrained, **layout | {"img_size": 32, "patch": 2} | kwargs)


@register_model
def maformer_tiny(pretrained: bool = False, **kwargs) -> MAFormer:
    return MAFormer.build("maformer_tiny", pretrained, **{"dim": 64, "heads": (2, 4, 8, 16)} | kwargs)
