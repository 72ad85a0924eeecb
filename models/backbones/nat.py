"""NAT: Neighborhood Attention Transformer (Hassani et al., CVPR 2023, arXiv:2204.07143).

Written after the paper and the authors' repository, SHI-Labs/Neighborhood-Attention-Transformer (MIT); its checkpoints
load.
"""

from collections.abc import Sequence

from timm.layers import DropPath, LayerNorm2d, LayerScale, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, init_weights, stage_layout
from ops import create_ops, parse_mixers
from ops.registry import Spec


class Block(nn.Module):
    """Token mixing and MLP, each added to the map (B, C, H, W).

    Args:
        dim: Number of channels.
        mixer: Token mixer.
        mlp_ratio: Width of the MLP relative to the channels.
        layer_scale: Initial factor, learned for each channel, on what is added; None leaves it out.
        drop_path: Drop path rate.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, layer_scale: float | None, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **context) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.ls1(self.mixer(self.norm1(x), **context)))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return x.permute(0, 3, 1, 2)


def neighborhoods(dilations: Sequence[Sequence[int]], kernel: int = 7) -> list[list[Spec]]:
    """Return mixers of neighbourhood attention.

    Args:
        dilations: For each stage the dilations that its blocks take in turn.
        kernel: Side of a neighbourhood, in tokens.
    """
    return [[{"name": "neighborhood", "kernel": kernel, "dilation": d} for d in stage] for stage in dilations]


class NAT(HierarchicalBackbone):
    """Pyramid with neighbourhood attention.

    Args:
        dim: Number of channels of the first stage; every further stage has twice as many.
        depths: Number of blocks in each stage.
        heads: Number of attention heads in each stage.
        mlp_ratio: Width of the MLP relative to the channels.
        kernel: Side of a neighbourhood, in tokens.
        dilations: For each stage the dilations of the neighbourhoods, which the stage's blocks take in turn.
        layer_scale: Initial factor, learned for each channel, on what a block adds; None leaves it out.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: neighbourhood attention.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    map_norms = True
    renames = (
        (r"^patch_embed\.proj\.", "stages.0.downsample."),
        (r"^patch_embed\.norm\.", "stages.0.downsample.2."),
        (r"^levels\.(\d)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
        (r"\.downsample\.reduction\.", ".downsample.0."),
        (r"\.downsample\.norm\.", ".downsample.1."),
        (r"^levels\.", "stages."),
        (r"\.attn\.", ".mixer."),
        (r"\.gamma([12])$", r".ls\1.gamma"),
    )

    def __init__(
        self,
        dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        kernel: int = 7,
        dilations: Sequence[Sequence[int]] = ((1,), (1,), (1,), (1,)),
        layer_scale: float | None = None,
        mixers: Spec | Sequence | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        specs = parse_mixers(neighborhoods(dilations, kernel) if mixers is None else mixers, depths)
        dims, strides, rates = stage_layout(dim, depths, drop_path_rate)
        stages = []
        for i, width in enumerate(dims):
            if i:
                convs = [nn.Conv2d(dims[i - 1], width, 3, stride=2, padding=1, bias=False)]
            else:
                convs = [
                    nn.Conv2d(in_chans, width // 2, 3, stride=2, padding=1),
                    nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
                ]
            ops, contexts = create_ops(specs[i], width, heads[i], stage=i, stride=strides[i])
            blocks = [Block(width, op, mlp_ratio, layer_scale, rate) for op, rate in zip(ops, rates[i], strict=True)]
            stages.append(Stage(nn.Sequential(*convs, LayerNorm2d(width, eps=1e-5)), blocks, contexts))
        super().__init__(stages, dims, strides, LayerNorm2d(dims[-1], eps=1e-5), in_chans=in_chans, **kwargs)
        self.apply(init_weights)


default_cfgs = generate_default_cfgs(
    {
        f"nat_{size}.in1k": imagenet_cfg(f"https://shi-labs.com/projects/nat/checkpoints/CLS/nat_{size}.pth")
        for size in ("mini", "tiny", "small", "base")
    }
)

SMALL = {"dim": 96, "depths": (3, 4, 18, 5), "heads": (3, 6, 12, 24), "mlp_ratio": 2.0}
BASE = {"dim": 128, "depths": (3, 4, 18, 5), "heads": (4, 8, 16, 32), "mlp_ratio": 2.0}


@register_model
def nat_mini(pretrained: bool = False, **kwargs) -> NAT:
    return NAT.build("nat_mini", pretrained, **kwargs)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs) -> NAT:
    return NAT.build("nat_tiny", pretrained, **{"depths": (3, 4, 18, 5)} | kwargs)


@register_model
def nat_small(pretrained: bool = False, **kwargs) -> NAT:
    return NAT.build("nat_small", pretrained, **SMALL | {"layer_scale": 1e-5} | kwargs)


@register_model
def nat_base(pretrained: bool = False, **kwargs) -> NAT:
    return NAT.build("nat_base", pretrained, **BASE | {"layer_scale": 1e-5} | kwargs)
