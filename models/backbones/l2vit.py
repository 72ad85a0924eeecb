"""L2ViT: The Linear Attention Resurrection in Vision Transformer (Zheng, 2025, arXiv:2501.16182).

Written after the paper and the author's repository, ChuanyangZheng/L2ViT (MIT); its checkpoints load.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, stage_layout
from models.layers.conv import conv_bn
from models.layers.downsample import PatchConv2d
from ops import create_ops, parse_mixers
from ops.registry import Spec
from retinue.utils.arithmetic import padding


class Stem(nn.Sequential):
    """Two convolutions with stride 2, and norms: (B, C, H, W) to (B, dim, ⌈H / 4⌉, ⌈W / 4⌉)."""

    def __init__(self, in_chans: int, dim: int):
        half = dim // 2
        super().__init__(*conv_bn(in_chans, half), nn.ReLU(), *conv_bn(half, dim), LayerNorm2d(dim, eps=1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, padding(x.shape[3], 4), 0, padding(x.shape[2], 4))))


class Concentration(nn.Sequential):
    """Norm and the paper's local concentration module: two depthwise convolutions of 7 x 7 tokens."""

    def __init__(self, dim: int):
        first, second = (nn.Conv2d(dim, dim, 7, padding=3, groups=dim) for _ in range(2))
        super().__init__(LayerNorm2d(dim, eps=1e-5), first, nn.GELU(), nn.BatchNorm2d(dim), second)


class Block(nn.Module):
    """Depthwise convolution (position), token mixing, a local step and MLP, each added to the map (B, C, H, W).

    Args:
        dim: Number of channels.
        mixer: Token mixer.
        drop_path: Drop path rate.
        whole: The mixer attends to the whole map, so that the local step is local concentration. Otherwise the mixer
            attends within windows, and the local step is a second depthwise convolution for position.
    """

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float, whole: bool):
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.local = Concentration(dim) if whole else nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path, self.drop_local = DropPath(drop_path), DropPath(drop_path if whole else 0.0)

    def forward(self, x: Tensor, **context) -> Tensor:
        x = (x + self.pos_embed(x)).permute(0, 2, 3, 1)
        x = (x + self.drop_path(self.mixer(self.norm1(x), **context))).permute(0, 3, 1, 2)
        x = (x + self.drop_local(self.local(x))).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


def init_normal(module: nn.Module) -> None:
    """Initialise linear layers and convolutions as the author does, for `nn.Module.apply`."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class L2ViT(HierarchicalBackbone):
    """Pyramid whose blocks alternate between attention within windows and linear attention to the whole map.

    Args:
        dim: Number of channels of the first stage; every further stage has twice as many.
        depths: Number of blocks in each stage.
        heads: Number of attention heads in each stage.
        window: Side of a window. Checkpoints for 224 pixels have 7, checkpoints for 384 pixels have 12.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: as above.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    map_norms = True
    renames = (
        (r"^downsample_layers\.0\.proj\.proj\.", "stages.0.downsample."),
        (r"^downsample_layers\.0\.norm\.", "stages.0.downsample.5."),
        (r"^downsample_layers\.(\d)\.norm\.", r"stages.\1.downsample.0."),
        (r"^downsample_layers\.(\d)\.proj\.", r"stages.\1.downsample.1."),
        (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\.cpe\.0\.proj\.", ".pos_embed."),
        (r"\.cpe\.1\.proj\.", ".local."),
        (r"\.norm3\.", ".local.0."),
        (r"\.local_mp\.conv1\.", ".local.1."),
        (r"\.local_mp\.bn\.", ".local.3."),
        (r"\.local_mp\.conv2\.", ".local.4."),
        (r"\.attn\.", ".mixer."),
    )

    def __init__(
        self,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        mixers: Spec | Sequence | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        if mixers is None:
            mixers = [[{"name": "plain_window", "window": window}, "enhanced_linear"]] * len(depths)
        specs = parse_mixers(mixers, depths)
        dims, strides, rates = stage_layout(dim, depths, drop_path_rate)
        stages = []
        for i, width in enumerate(dims):
            downsample = Stem(in_chans, width)
            if i:
                downsample = nn.Sequential(LayerNorm2d(dims[i - 1], eps=1e-5), PatchConv2d(dims[i - 1], width, 2))
            ops, contexts = create_ops(specs[i], width, heads[i], stage=i, stride=strides[i])
            blocks = [
                Block(width, op, rate, whole=j % 2 == 1) for j, (op, rate) in enumerate(zip(ops, rates[i], strict=True))
            ]
            stages.append(Stage(downsample, blocks, contexts))
        super().__init__(stages, dims, strides, LayerNorm2d(dims[-1], eps=1e-5), in_chans=in_chans, **kwargs)
        self.apply(init_normal)


_RELEASES = "https://github.com/ChuanyangZheng/L2ViT/releases/download/v1.0/L2ViT-"
default_cfgs = generate_default_cfgs(
    {
        f"l2vit_{size}.in1k": imagenet_cfg(f"{_RELEASES}{size.title()}-checkpoint-best-ema.pth")
        for size in ("tiny", "small", "base")
    }
    | {
        "l2vit_base.in22k": imagenet_cfg(f"{_RELEASES}Base-22k-pretrain-checkpoint-best.pth", num_classes=21841),
        "l2vit_base.in22k_ft_in1k": imagenet_cfg(f"{_RELEASES}Base-22k21k-finetune-224-checkpoint-best.pth"),
        # These weights are for `window=12`.
        "l2vit_base.in22k_ft_in1k_384": imagenet_cfg(
            f"{_RELEASES}Base-22k21k-finetune-384-checkpoint-best.pth",
            input_size=(3, 384, 384),
            pool_size=(12, 12),
            crop_pct=1.0,
        ),
    }
)


@register_model
def l2vit_tiny(pretrained: bool = False, **kwargs) -> L2ViT:
    return L2ViT.build("l2vit_tiny", pretrained, **kwargs)


@register_model
def l2vit_small(pretrained: bool = False, **kwargs) -> L2ViT:
    return L2ViT.build("l2vit_small", pretrained, **{"depths": (2, 2, 18, 2)} | kwargs)


@register_model
def l2vit_base(pretrained: bool = False, **kwargs) -> L2ViT:
    arguments = {"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}
    return L2ViT.build("l2vit_base", pretrained, **arguments | kwargs)
