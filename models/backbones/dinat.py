"""DiNAT: Dilated Neighborhood Attention Transformer (Hassani and Shi, 2022, arXiv:2209.15001).

DiNAT is NAT with dilated neighbourhoods in every second block; DiNATs is Swin with such neighbourhoods in place of
windows. Written after the paper and the authors' repository, SHI-Labs/Neighborhood-Attention-Transformer (MIT); its
checkpoints load. For larger images the authors use the same weights with larger `dilations`:

    384 pixels                  (1, 13), (1, 6), (1, 3), (1,)
    segmentation, 512 pixels    (1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2)
    detection                   (1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from models.backbones.nat import BASE, NAT, SMALL, neighborhoods
from models.backbones.swin import Swin
from models.hierarchical import imagenet_cfg

# At 224 pixels the maps have 56, 28, 14 and 7 tokens a side: the largest dilations for which 7 neighbours fit in.
DILATIONS = ((1, 8), (1, 4), (1, 2), (1,))


_RELEASES = "https://shi-labs.com/projects/dinat/checkpoints/"
default_cfgs = generate_default_cfgs(
    {
        f"dinat_{size}.in1k": imagenet_cfg(f"{_RELEASES}imagenet1k/dinat_{size}_in1k_224.pth")
        for size in ("mini", "tiny", "small", "base", "s_tiny", "s_small", "s_base")
    }
    | {
        "dinat_large.in22k_in1k": imagenet_cfg(f"{_RELEASES}imagenet1k/dinat_large_in22k_in1k_224.pth"),
        "dinat_large.in22k": imagenet_cfg(f"{_RELEASES}imagenet22k/dinat_large_in22k_224.pth", num_classes=21841),
        "dinat_s_large.in22k_in1k": imagenet_cfg(f"{_RELEASES}imagenet1k/dinat_s_large_in1k_224.pth"),
    }
)


def _dinat(name: str, pretrained: bool, **kwargs: Any) -> NAT:
    """Build NAT with dilated neighbourhoods."""
    return NAT.build(name, pretrained, **{"dilations": DILATIONS} | kwargs)


def _dinat_s(name: str, pretrained: bool, **kwargs: Any) -> Swin:
    """Build Swin with dilated neighbourhoods; `dilations` is an argument of ours that Swin does not have."""
    mixers = neighborhoods(kwargs.pop("dilations", DILATIONS))
    return Swin.build(name, pretrained, **{"mixers": mixers} | kwargs)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs) -> NAT:
    return _dinat("dinat_mini", pretrained, **kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs) -> NAT:
    return _dinat("dinat_tiny", pretrained, **{"depths": (3, 4, 18, 5)} | kwargs)


@register_model
def dinat_small(pretrained: bool = False, **kwargs) -> NAT:
    return _dinat("dinat_small", pretrained, **SMALL | kwargs)


@register_model
def dinat_base(pretrained: bool = False, **kwargs) -> NAT:
    return _dinat("dinat_base", pretrained, **BASE | {"layer_scale": 1e-5} | kwargs)


@register_model
def dinat_large(pretrained: bool = False, **kwargs) -> NAT:
    return _dinat("dinat_large", pretrained, **SMALL | {"dim": 192, "heads": (6, 12, 24, 48)} | kwargs)


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs) -> Swin:
    return _dinat_s("dinat_s_tiny", pretrained, **kwargs)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs) -> Swin:
    return _dinat_s("dinat_s_small", pretrained, **{"depths": (2, 2, 18, 2)} | kwargs)


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs) -> Swin:
    arguments = {"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}
    return _dinat_s("dinat_s_base", pretrained, **arguments | kwargs)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs) -> Swin:
    arguments = {"dim": 192, "depths": (2, 2, 18, 2), "heads": (6, 12, 24, 48)}
    return _dinat_s("dinat_s_large", pretrained, **arguments | kwargs)
