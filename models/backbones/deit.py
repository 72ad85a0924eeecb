"""DeiT (Touvron et al., ICML 2021, arXiv:2012.12877).

Paper: Training Data-efficient Image Transformers & Distillation through Attention. Written after the paper and the
authors' repository, facebookresearch/deit (Apache-2.0); its checkpoints load. timm has the nets too
(`deit_tiny_patch16_224`), and the nets with a distillation token; the nets here take any token mixer.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from models.hierarchical import imagenet_cfg
from models.plain import PlainBackbone


class DeiT(PlainBackbone):
    """ViT's layout, with the names of DeiT's checkpoints."""

    renames = ((r"\.attn\.", ".mixer."),)


def deit_cfg(url: Any) -> dict:
    """Return the `default_cfgs` entry of a net in DeiT's layout, whose positions belong to one image size."""
    return imagenet_cfg(url, pool_size=None, first_conv="patch_embed.proj", fixed_input_size=True)


default_cfgs = generate_default_cfgs(
    {
        f"deit_{name}.in1k": deit_cfg(f"https://dl.fbaipublicfiles.com/deit/deit_{name}_patch16_224-{digest}.pth")
        for name, digest in {"tiny": "a1311bcf", "small": "cd65a155", "base": "b5f2ef4d"}.items()
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
