"""FocalNets of one resolution: Focal Modulation Networks (Yang et al., NeurIPS 2022, arXiv:2203.11926), table 5.

Written after the paper and the authors' repository, microsoft/FocalNet (MIT); its checkpoints load. timm has the nets
of four stages (`focalnet_tiny_srf`).
"""

from collections.abc import Sequence

from timm.layers import LayerScale
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from models import plain
from models.hierarchical import imagenet_cfg
from ops.registry import Spec


class FocalNetIso(plain.PlainBackbone):
    """ViT's layout with focal modulation, without positions and class token, with a norm after the patch embedding.

    Args:
        depths: Number of blocks, as one entry.
        mixers: Token mixers, as `ops.parse_mixers` reads them.
        **kwargs: Further arguments of `PlainBackbone`.
    """

    positions = False
    patch_norm = True
    eps = 1e-5
    renames = (
        (r"^layers\.0\.", ""),
        (r"\.modulation\.", ".mixer."),
        (r"\.gamma_([12])$", r".ls\1.gamma"),
    )

    def __init__(self, depths: Sequence[int] = (12,), mixers: Spec | Sequence = "focal_modulation", **kwargs):
        super().__init__(depths=depths, mixers=mixers, class_token=False, **kwargs)


class PostNormBlock(plain.Block):
    """Block with the norm after the mixer and after the MLP; each result is scaled, then added to the tokens."""

    def __init__(self, dim: int, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        self.ls1, self.ls2 = LayerScale(dim, 1e-4), LayerScale(dim, 1e-4)

    def forward(self, x: Tensor, size: Sequence[int], **context) -> Tensor:
        x = x + self.drop_path(self.ls1(self.norm1(self.mix(x, size, **context))))
        return x + self.drop_path(self.ls2(self.norm2(self.mlp(x))))


class PostNormFocalNetIso(FocalNetIso):
    """FocalNet of one resolution with post-norm blocks, as the authors' function for the base size builds it."""

    block = PostNormBlock


_RELEASES = "https://projects4jw.blob.core.windows.net/focalnet/release/classification/"
default_cfgs = generate_default_cfgs(
    {
        f"focalnet_{size}_iso.in1k": imagenet_cfg(
            f"{_RELEASES}focalnet_{size}_iso_16.pth", pool_size=None, first_conv="patch_embed.proj"
        )
        for size in ("tiny", "small", "base")
    }
)


@register_model
def focalnet_tiny_iso(pretrained: bool = False, **kwargs) -> FocalNetIso:
    return FocalNetIso.build("focalnet_tiny_iso", pretrained, **{"dim": 192, "heads": 3} | kwargs)


@register_model
def focalnet_small_iso(pretrained: bool = False, **kwargs) -> FocalNetIso:
    return FocalNetIso.build("focalnet_small_iso", pretrained, **{"dim": 384, "heads": 6} | kwargs)


@register_model
def focalnet_base_iso(pretrained: bool = False, **kwargs) -> FocalNetIso:
    return PostNormFocalNetIso.build("focalnet_base_iso", pretrained, **kwargs)
