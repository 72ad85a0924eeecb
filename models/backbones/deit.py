"""DeiT (Touvron et al., ICML 2021, arXiv:2012.12877).

Paper: Training Data-efficient Image Transformers & Distillation through Attention. Written after the paper and the
authors' repository, facebookresearch/deit (Apache-2.0); its checkpoints load, those with a distillation token too. timm
has the nets as well (`deit_tiny_patch16_224`); the nets here take any token mixer.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from models.hierarchical import imagenet_cfg
from models.plain import PlainBackbone


class DeiT(PlainBackbone):
    """ViT's layout, with the names of DeiT's checkpoints.

    Attributes:
        qkv_bias: Whether the queries, keys and values of the paper's attention have a bias.
    """

    qkv_bias = True
    renames = ((r"\.attn\.", ".mixer."),)


def deit_cfg(url: Any, **kwargs) -> Any:
    """Return the `default_cfgs` entry of a net in DeiT's layout, whose positions belong to one image size."""
    own = {"pool_size": None, "first_conv": "patch_embed.proj", "fixed_input_size": True}
    return imagenet_cfg(url, **own | kwargs)


default_cfgs = generate_default_cfgs(
    {
        f"deit_{name}.in1k": deit_cfg(f"https://dl.fbaipublicfiles.com/deit/deit_{name}_patch16_224-{digest}.pth")
        for name, digest in {"tiny": "a1311bcf", "small": "cd65a155", "base": "b5f2ef4d"}.items()
    }
    | {
        f"deit_{name}_distilled.in1k": deit_cfg(
            f"https://dl.fbaipublicfiles.com/deit/deit_{name}_distilled_patch16_224-{digest}.pth",
            classifier=("head", "head_dist"),
        )
        for name, digest in {"tiny": "b40b3cf7", "small": "649709d9", "base": "df68dfff"}.items()
    }
)


@register_model
def deit_tiny(pretrained: bool = False, **kwargs) -> DeiT:
    return DeiT.build("deit_tiny", pretrained, **{"dim": 192, "heads": 3} | kwargs)


@register_model
def deit_small(pretrained: bool = False, **kwargs) -> DeiT:
    return DeiT.build("deit_small", pretrained, **{"dim": 384, "heads": 6} | kwargs)


@register_model
def deit_base(pretrained: bool = False, **kwargs) -> DeiT:
    return DeiT.build("deit_base", pretrained, **kwargs)


@register_model
def deit_tiny_distilled(pretrained: bool = False, **kwargs) -> DeiT:
    return DeiT.build("deit_tiny_distilled", pretrained, **{"dim": 192, "heads": 3, "distilled": True} | kwargs)


@register_model
def deit_small_distilled(pretrained: bool = False, **kwargs) -> DeiT:
    return DeiT.build("deit_small_distilled", pretrained, **{"dim": 384, "heads": 6, "distilled": True} | kwargs)


@register_model
def deit_base_distilled(pretrained: bool = False, **kwargs) -> DeiT:
    return DeiT.build("deit_base_distilled", pretrained, **{"distilled": True} | kwargs)
