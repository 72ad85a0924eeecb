"""S2AFormer: Strip Self-Attention for Efficient Vision Transformer (Xu et al., IEEE TIP 2025, arXiv:2505.22195).

By the paper's abstract and summaries; there is no public code. The order of a block's four parts and the convolutional
stem are known. The sizes, the form of the local interaction (that of XCiT) and all further details are ours.
"""

from collections.abc import Sequence

from timm.layers import DropPath, LayerNorm2d, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, stage_layout
from models.layers.conv import conv_bn
from models.layers.pvt_v2 import init_conv
from ops import create_ops, parse_mixers
from ops.registry import Spec


class Block(nn.Module):
    """Depthwise convolution, token mixing, local interaction and MLP, each added to the map (B, C, H, W)."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float):
        super().__init__()
        self.conv = depthwise(dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = LayerNorm2d(dim, eps=1e-6)
        self.local = nn.Sequential(depthwise(dim), nn.BatchNorm2d(dim), nn.GELU(), depthwise(dim))
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **context) -> Tensor:
        x = (x + self.conv(x)).permute(0, 2, 3, 1)
        x = (x + self.drop_path(self.mixer(self.norm1(x), **context))).permute(0, 3, 1, 2)
        x = (x + self.drop_path(self.local(self.norm2(x)))).permute(0, 2, 3, 1)
        return (x + self.drop_path(self.mlp(self.norm3(x)))).permute(0, 3, 1, 2)


class S2AFormer(HierarchicalBackbone):
    """Pyramid with strip self-attention.

    Args:
        dims: Number of channels of each stage.
        depths: Number of blocks in each stage.
        heads: Number of attention heads in each stage.
        mixers: Token mixers, as `ops.parse_mixers` reads them.
        patch: Stride of the first stage in pixels, 2 or 4.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    def __init__(
        self,
        dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (1, 3, 6, 12),
        mixers: Spec | Sequence = "strip_self",
        patch: int = 4,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        if patch not in (2, 4):
            raise ValueError(f"patch must be 2 or 4, not {patch}")
        specs = parse_mixers(mixers, depths)
        dims, strides, rates = stage_layout(dims, depths, drop_path_rate, patch)
        hidden = dims[0] // 2
        stem = [*conv_bn(in_chans, hidden, patch // 2), nn.GELU()]
        stem += [*conv_bn(hidden, hidden, 1), nn.GELU(), *conv_bn(hidden, hidden, 1), nn.GELU()]
        stages = []
        for i, dim in enumerate(dims):
            embedding = [nn.Conv2d(dims[i - 1] if i else hidden, dim, 3, 2, 1), LayerNorm2d(dim, eps=1e-6)]
            ops, contexts = create_ops(specs[i], dim, heads[i], stage=i, stride=strides[i])
            blocks = [Block(dim, op, rate) for op, rate in zip(ops, rates[i], strict=True)]
            stages.append(Stage(nn.Sequential(*([] if i else stem), *embedding), blocks, contexts))
        super().__init__(stages, dims, strides, LayerNorm2d(dims[-1], eps=1e-6), in_chans=in_chans, **kwargs)
        self.apply(init_conv)


def depthwise(dim: int) -> nn.Conv2d:
    """Return a 3 x 3 depthwise convolution."""
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


default_cfgs = generate_default_cfgs(
    {
        "s2aformer_nano": imagenet_cfg(input_size=(3, 32, 32), pool_size=(2, 2)),
        "s2aformer_tiny": imagenet_cfg(),
    }
)


@register_model
def s2aformer_nano(pretrained: bool = False, **kwargs) -> S2AFormer:
    """Return a small net for small images and CPUs; 32 pixels give maps of 16, 8, 4 and 2 tokens a side."""
    arguments = {"dims": (32, 64, 128, 256), "depths": (1, 1, 2, 1), "heads": (1, 2, 4, 8), "patch": 2}
    return S2AFormer.build("s2aformer_nano", pretrained, **arguments | kwargs)


@register_model
def s2aformer_tiny(pretrained: bool = False, **kwargs) -> S2AFormer:
    return S2AFormer.build("s2aformer_tiny", pretrained, **kwargs)
