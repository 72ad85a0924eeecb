"""LV-ViT (Jiang et al., NeurIPS 2021, arXiv:2104.10858).

Paper: All Tokens Matter: Token Labeling for Training Better Vision Transformers. Written after the paper and the
authors' repository, zihangJiang/TokenLabeling (Apache-2.0); its checkpoints load. `task.token_labels` trains the
classifier of tokens; images are mixed here, not tokens as by the authors.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.backbones.deit import DeiT, deit_cfg
from ops.registry import Spec
from retinue.utils.arithmetic import padding


class Stem(nn.Module):
    """Four convolutions from images (B, in_chans, h, w) to a map (B, ⌈h / patch⌉, ⌈w / patch⌉, C).

    Images are zero-padded on the right and at the bottom to whole patches.

    Args:
        in_chans: Channels of the images.
        width: Channels of the first three convolutions.
        dim: Channels C.
        patch: Side of a patch in pixels; even.
        grid_size: Rows and columns of the map that the net's positions are learned for.

    Raises:
        ValueError: `patch` is odd.
    """

    def __init__(self, in_chans: int, width: int, dim: int, patch: int, grid_size: tuple[int, int]):
        super().__init__()
        if patch % 2:
            raise ValueError(f"patch must be an even number of pixels, not {patch}")
        self.patch, self.grid_size = patch, grid_size
        self.conv1, self.bn1 = nn.Conv2d(in_chans, width, 7, 2, padding=3, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(width, dim, patch // 2, patch // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, padding(x.shape[3], self.patch), 0, padding(x.shape[2], self.patch)))
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        return self.proj(x).permute(0, 2, 3, 1)


class LVViT(DeiT):
    """ViT with a convolutional stem, scaled residual branches and scores of each token.

    The scores are those of the class token plus half of each class's maximum over the scores of the map's tokens.

    Args:
        dim: As in `PlainBackbone`.
        depths: As in `PlainBackbone`.
        heads: As in `PlainBackbone`.
        patch: Side of a patch in pixels; even.
        mlp_ratio: As in `PlainBackbone`.
        stem: Channels of the stem's first convolutions.
        skip: Divisor of what the mixers and the MLPs add.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: full attention without biases of the queries,
            keys and values.
        in_chans: Number of channels of the images.
        **kwargs: Further arguments of `PlainBackbone`.
    """

    classifiers = ("head", "aux_head")
    qkv_bias = False
    eps = 1e-5
    aux_head: nn.Module

    def __init__(
        self,
        dim: int = 384,
        depths: Sequence[int] = (16,),
        heads: int = 6,
        patch: int = 16,
        mlp_ratio: float = 3.0,
        stem: int = 64,
        skip: float = 2.0,
        mixers: Spec | Sequence | None = None,
        in_chans: int = 3,
        **kwargs,
    ):
        mixers = {"name": "full", "qkv_bias": self.qkv_bias} if mixers is None else mixers
        super().__init__(
            dim=dim, depths=depths, heads=heads, patch=patch, mlp_ratio=mlp_ratio, mixers=mixers, in_chans=in_chans,
            distilled=False, **kwargs,
        )  # fmt: skip
        self.patch_embed = Stem(in_chans, stem, dim, patch, self.patch_embed.grid_size)
        blocks: Any = self.blocks
        for block in blocks:
            block.branch_scale = 1 / skip

    @property
    def token_classifier(self) -> nn.Module:
        return self.aux_head

    def distillation_tokens(self, features: Tensor) -> Tensor:
        """Return the scores of the map's tokens (B, N, num_classes), which Sparsifiner compares with the teacher's."""
        return self.aux_head(super().distillation_tokens(features))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the scores (B, num_classes); `pre_logits` returns the pooled tokens."""
        scores = super().forward_head(x, pre_logits)
        if pre_logits or scores.ndim == 3 or not self.num_classes:
            return scores
        return scores + 0.5 * self.aux_head(x[:, self.extra :]).amax(1)


def lvvit_cfg(url: str = "", **kwargs) -> Any:
    """Return the `default_cfgs` entry of a net."""
    return deit_cfg(url, first_conv="patch_embed.conv1", classifier=LVViT.classifiers, **{"crop_pct": 0.9} | kwargs)


def _weights(file: str, size: int = 224, **kwargs) -> Any:
    """Return the entry of released weights for images of `size` pixels."""
    url = f"https://github.com/zihangJiang/TokenLabeling/releases/download/{file}"
    return lvvit_cfg(url, input_size=(3, size, size), **kwargs)


# The first entry of a net is its default.
default_cfgs = generate_default_cfgs(
    {
        "lvvit_tiny.in1k": _weights("v0.2.0/lvvit_t.pth"),
        "lvvit_small.in1k": _weights("1.0/lvvit_s-26M-224-83.3.pth.tar"),
        "lvvit_small.in1k_384": _weights("1.0/lvvit_s-26M-384-84.4.pth.tar", 384),
        "lvvit_medium.in1k": _weights("1.0/lvvit_m-56M-224-84.0.pth.tar", crop_pct=1.0),
        "lvvit_medium.in1k_384": _weights("1.0/lvvit_m-56M-384-85.4.pth.tar", 384, crop_pct=1.0),
        "lvvit_medium.in1k_448": _weights("1.0/lvvit_m-56M-448-85.5.pth.tar", 448, crop_pct=1.0),
        "lvvit_large.in1k_448": _weights("1.0/lvvit_l-150M-448-86.2.pth.tar", 448, crop_pct=1.0),
        "lvvit_large.in1k_512": _weights("1.0/lvvit_l-150M-512-86.4.pth.tar", 512, crop_pct=1.0),
    }
)

SMALL = {"dim": 384, "depths": (16,), "heads": 6}
MEDIUM = {"dim": 512, "depths": (20,), "heads": 8}


@register_model
def lvvit_tiny(pretrained: bool = False, **kwargs) -> LVViT:
    return LVViT.build("lvvit_tiny", pretrained, **{"dim": 240, "depths": (12,), "heads": 4, "skip": 1.0} | kwargs)


@register_model
def lvvit_small(pretrained: bool = False, **kwargs) -> LVViT:
    return LVViT.build("lvvit_small", pretrained, **SMALL | kwargs)


@register_model
def lvvit_medium(pretrained: bool = False, **kwargs) -> LVViT:
    return LVViT.build("lvvit_medium", pretrained, **MEDIUM | kwargs)


@register_model
def lvvit_large(pretrained: bool = False, **kwargs) -> LVViT:
    arguments = {"dim": 768, "depths": (24,), "heads": 12, "stem": 128, "skip": 3.0}
    return LVViT.build("lvvit_large", pretrained, **arguments | kwargs)
