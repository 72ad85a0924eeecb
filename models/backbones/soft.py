"""SOFT: Softmax-free Transformer with Linear Complexity (Lu et al., NeurIPS 2021, arXiv:2110.11945), and SOFT++.

SOFT++ is the second release (Softmax-free Linear Transformers, IJCV 2024, arXiv:2207.03341), whose kernels are
normalised: `soft_norm_*`. Written after the papers and the authors' repository, fudan-zvg/SOFT (MIT); its checkpoints
load.
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import GELUTanh, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.backbones import pvt
from models.hierarchical import imagenet_cfg
from ops.registry import Spec


class PostNormBlock(nn.Module):
    """Token mixing and an MLP with tanh's GELU, each added to the map (B, C, H, W) and followed by a norm.

    The authors use their drop path rate as the rate of a dropout.
    """

    def __init__(self, dim: int, mixer: nn.Module, dropout: float):
        super().__init__()
        self.mixer = mixer
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, act_layer=GELUTanh)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, **context) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = self.norm1(x + self.dropout(self.mixer(x, **context)))
        x = self.norm2(x + self.dropout(self.mlp(x)))
        return x.permute(0, 3, 1, 2)


class SOFT(pvt.PVT):
    """Pyramid with softmax-free attention in post-norm blocks, and full attention with a class token in the last stage.

    Args:
        dims: Number of channels of each stage.
        depths: Number of blocks in each stage.
        heads: Number of attention heads in each stage.
        normalized: Normalise the kernels, as in the second release.
        ratios: Ratio of the landmarks in each stage but the last.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: as above.
        patch: Side of a patch of the stem, 2 or 4 pixels.
        **kwargs: Further arguments of `PVT`.
    """

    renames = (
        *pvt.PVT.renames[:-1],
        (r"\.att\.mha\.", ".mixer."),
        (r"\.att\.ff(\d)\.", r".mlp.fc\1."),
        (r"\.att\.", "."),
        (r"(stages\.3\.blocks\.\d+)\.attn\.", r"\1.mixer."),
    )

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (1, 2, 3, 2),
        heads: Sequence[int] = (2, 4, 10, 16),
        normalized: bool = False,
        ratios: Sequence[int] = (8, 4, 2),
        mixers: Spec | Sequence | None = None,
        patch: int = 4,
        **kwargs,
    ):
        if patch not in (2, 4):
            raise ValueError(f"patch must be 2 or 4, not {patch}")
        if mixers is None:
            mixers = [*({"name": "softmax_free", "ratio": r, "normalized": normalized} for r in ratios), "full"]
        super().__init__(dims, depths, heads, (4, 4, 4, 4), mixers, patch=patch, **kwargs)

    def make_embedding(self, stage: int, in_dim: int, dim: int, patch: int) -> tuple[nn.Module, nn.Module]:
        """Return convolutions with batch norms: one of stride 2, or three in the stem, the last of stride patch / 2."""
        strides = (2,) if stage else (2, 1, patch // 2)
        layers: list[nn.Module] = []
        for i, stride in enumerate(strides, start=1):
            out_dim = dim if i == len(strides) else 32
            layers += [nn.Conv2d(in_dim, out_dim, 3, stride, padding=1), nn.BatchNorm2d(out_dim), nn.ReLU()]
            in_dim = out_dim
        return nn.Sequential(*layers), nn.Identity()

    def make_block(self, stage: int, dim: int, mixer: nn.Module, mlp_ratio: float, drop_path: float) -> nn.Module:
        if stage == 3:
            return super().make_block(stage, dim, mixer, mlp_ratio, drop_path)
        return PostNormBlock(dim, mixer, drop_path)


def _cfg(share: str = "", name: str = "", **kwargs) -> Any:
    url = (f"https://drive.google.com/uc?id={share}", f"{name}.pth") if share else ""
    return imagenet_cfg(url, first_conv="stages.0.downsample.proj.0", fixed_input_size=True, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "soft_nano": _cfg(input_size=(3, 32, 32), pool_size=(2, 2)),
        "soft_tiny.in1k": _cfg("1S04DCotIOkP0DaBb8WStQ513z82qT9de", "SOFT_Tiny"),
        "soft_norm_tiny.in1k": _cfg("1Isy5b9v_4pyIXDqhKPNRq3WKH0etDlfl", "SOFT_Tiny_norm"),
        "soft_norm_small.in1k": _cfg("1OBjn7FzVdNP1Urqxq7X0yDykyPhxAAW1", "SOFT_Small_norm"),
        "soft_norm_medium.in1k": _cfg("1K2C6daaJn3jwurWh38uvV7rexirWjuzh", "SOFT_Medium_norm"),
        "soft_norm_large.in1k": _cfg("1aRYuF_gbBGyiXUDKEcpHJmM04SdvTUdP", "SOFT_Large_norm"),
    }
    | {name: _cfg() for name in ("soft_small", "soft_medium", "soft_large", "soft_huge", "soft_norm_huge")}
)

SMALL: dict[str, Any] = {"depths": (1, 3, 20, 4)}
MEDIUM: dict[str, Any] = {"dims": (64, 128, 288, 512), "depths": (1, 3, 29, 5), "heads": (2, 4, 9, 16)}
LARGE: dict[str, Any] = {"depths": (1, 3, 40, 5)}
HUGE: dict[str, Any] = {"dims": (64, 128, 352, 512), "depths": (1, 5, 49, 5), "heads": (2, 4, 11, 16)}


@register_model
def soft_nano(pretrained: bool = False, **kwargs) -> SOFT:
    """Return a small net of our own for small images and CPUs; 32 pixels give maps of 16, 8, 4 and 2 tokens a side."""
    dims, depths, heads = (32, 64, 128, 256), (1, 2, 2, 2), (1, 2, 4, 8)
    arguments = {"dims": dims, "depths": depths, "heads": heads, "ratios": (4, 2, 1), "patch": 2, "img_size": 32}
    return SOFT.build("soft_nano", pretrained, **arguments | kwargs)


@register_model
def soft_tiny(pretrained: bool = False, **kwargs) -> SOFT:
    return SOFT.build("soft_tiny", pretrained, **kwargs)


@register_model
def soft_small(pretrained: bool = False, **kwargs) -> SOFT:
    return SOFT.build("soft_small", pretrained, **SMALL | kwargs)


@register_model
def soft_medium(pretrained: bool = False, **kwargs) -> SOFT:
    return SOFT.build("soft_medium", pretrained, **MEDIUM | kwargs)


@register_model
def soft_large(pretrained: bool = False, **kwargs) -> SOFT:
    return SOFT.build("soft_large", pretrained, **LARGE | kwargs)


@register_model
def soft_huge(pretrained: bool = False, **kwargs) -> SOFT:
    return SOFT.build("soft_huge", pretrained, **HUGE | kwargs)


@register_model
def soft_norm_tiny(pretrained: bool = False, **kwargs) -> SOFT:
    return SOFT.build("soft_norm_tiny", pretrained, **{"normalized": True} | kwargs)


@register_model
def soft_norm_small(pretrained: bool = False, **kwargs) -> SOFT:
    return SOFT.build("soft_norm_small", pretrained, **SMALL | {"normalized": True} | kwargs)


@register_model
def soft_norm_medium(pretrained: bool = False, **kwargs) -> SOFT:
    return SOFT.build("soft_norm_medium", pretrained, **MEDIUM | {"normalized": True} | kwargs)


@register_model
def soft_norm_large(pretrained: bool = False, **kwargs) -> SOFT:
    return SOFT.build("soft_norm_large", pretrained, **LARGE | {"normalized": True} | kwargs)


@register_model
def soft_norm_huge(pretrained: bool = False, **kwargs) -> SOFT:
    return SOFT.build("soft_norm_huge", pretrained, **HUGE | {"normalized": True} | kwargs)
