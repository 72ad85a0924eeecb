"""LoLA-SpecViT for images of many bands (Zidi et al., Remote Sensing 2025).

Paper: LoLA-SpecViT: Local Attention SwiGLU Vision Transformer with LoRA for Hyperspectral Imaging. Written after the
authors' repository, FadiZidiDz/LoLA-SpecViT-Model (no licence); its checkpoints load.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, SwiGLU, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.backbones import swin
from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, init_weights, stage_layout
from models.layers.squeeze import SqueezeExcite
from ops import create_ops, parse_mixers
from ops.lora import LoRALinear
from ops.registry import Spec


class BandConv(nn.Module):
    """Convolution over bands and places, (B, in_dim, bands, H, W) to (B, dim, bands, H, W), with zero padding.

    The weight has four dimensions, since a net is converted to channels-last memory, which five do not have.

    Args:
        in_dim: Input channels.
        dim: Output channels.
        bands: Number of bands that the kernel spans, odd; it spans 3 x 3 places.
    """

    def __init__(self, in_dim: int, dim: int, bands: int):
        super().__init__()
        like = nn.Conv3d(in_dim, dim, (bands, 3, 3))
        self.weight, self.bias = nn.Parameter(like.weight.detach().flatten(3)), like.bias

    def forward(self, x: Tensor) -> Tensor:
        padding = (self.weight.shape[2] // 2, 1, 1)
        return F.conv3d(x, self.weight.unflatten(3, (3, 3)), self.bias, padding=padding)


class SpectralStem(nn.Module):
    """3-D convolutions over bands and places, the mean over the bands, patches of 2 x 2 pixels and positions.

    The weights do not depend on the number of bands. Maps (B, bands, H, W) become (B, dim, H // 2, W // 2).

    Args:
        dim: Output channels.
        img_size: Side of the images, in pixels, that positions are learned for.
        band_drop_rate: Rate at which whole bands of a channel are dropped.
        pos_drop_rate: Dropout rate after the positions.
    """

    def __init__(self, dim: int, img_size: int, band_drop_rate: float, pos_drop_rate: float):
        super().__init__()
        layers = []
        for a, b, bands in ((1, 32, 7), (32, 64, 5), (64, dim, 3)):
            layers += [BandConv(a, b, bands), nn.BatchNorm3d(b), nn.SiLU()]
        self.spectral_conv = nn.Sequential(*layers)
        self.band_drop_rate = band_drop_rate
        self.spectral_attention = SqueezeExcite(dim, max(dim // 16, 1))
        self.patch_embed = nn.Sequential(nn.Conv2d(dim, dim, 4, stride=2, padding=1), nn.BatchNorm2d(dim), nn.SiLU())
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, img_size // 2, img_size // 2, dim), std=0.02))
        self.pos_drop = nn.Dropout(pos_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.spectral_conv(x[:, None])  # (B, dim, bands, H, W)
        # Each band of each channel is a channel of its own for this dropout.
        x = F.dropout2d(x.flatten(1, 2), self.band_drop_rate, self.training).view_as(x)
        x = self.patch_embed(self.spectral_attention(x).mean(2))
        positions = self.resize(self.pos_embed, x.shape[2:])
        return self.pos_drop(x + positions.permute(0, 3, 1, 2))

    def resize_table(self, name: str, value: Tensor) -> Tensor:
        """Interpolate a checkpoint's positions to this stem's grid, for `load_weights`."""
        return self.resize(value, self.pos_embed.shape[1:3]) if name == "pos_embed" else value

    def resize(self, positions: Tensor, size: Sequence[int]) -> Tensor:
        """Interpolate positions (1, h, w, C) to `size` (H, W)."""
        if positions.shape[1:3] == tuple(size):
            return positions
        resized = F.interpolate(positions.permute(0, 3, 1, 2), tuple(size), mode="bicubic")
        return resized.permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """Depthwise convolution and squeeze-excitation, then twice the channels at half the resolution."""

    def __init__(self, dim: int):
        super().__init__()
        depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        squeeze = SqueezeExcite(dim, max(dim // 16, 1))
        self.conv = nn.Sequential(depthwise, nn.SiLU(), squeeze, nn.Conv2d(dim, 2 * dim, 1, bias=False))
        self.norm = nn.BatchNorm2d(2 * dim)
        self.reduction = nn.Conv2d(2 * dim, 2 * dim, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(self.conv(x)))


class Block(swin.Block):
    """Token mixing, and an MLP of SwiGLU between two layers with adapters, each added to the map (B, C, H, W).

    Args:
        dim: Channels C.
        mixer: Op from (B, H, W, C) to the same shape.
        drop_path: Drop path rate.
        rank: Rank of the adapters.
        alpha: Scale of the adapters relative to `rank`.
        freeze: Whether the layers but their adapters stay as they are in training.
    """

    renames = (
        (r"^attn\.", "mixer."),
        (r"^mlp\.1\.w1\.", "mlp.1.fc1_g."),
        (r"^mlp\.1\.w2\.", "mlp.1.fc1_x."),
        (r"^mlp\.1\.w3\.", "mlp.1.fc2."),
    )

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float, rank: int, alpha: float, freeze: bool):
        super().__init__(dim, mixer, drop_path)
        adapter: Any = {"rank": rank, "alpha": alpha, "freeze": freeze}
        # The identity keeps the place of the authors' dropout, and with it the names of the weights.
        self.mlp = nn.Sequential(
            LoRALinear(dim, 4 * dim, **adapter),
            SwiGLU(4 * dim),
            nn.Identity(),
            LoRALinear(4 * dim, dim, **adapter),
        )


class LoLASpecViT(HierarchicalBackbone):
    """Pyramid with window attention, SwiGLU and adapters, for images of any number of bands.

    Args:
        img_size: Side of the images, in pixels, that positions are learned for.
        dim: Number of channels of the first stage; every further stage has twice as many.
        depths: Number of blocks in each stage.
        heads: Number of attention heads in each stage.
        window: Side of a window in tokens.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: windows with adapters.
        rank: Rank of the adapters.
        alpha: Scale of the adapters relative to `rank`.
        freeze: Train only the adapters of layers that have one. The authors freeze these layers in training from
            scratch too; default False.
        in_chans: Number of bands.
        num_classes: Number of classes; 0 leaves out the classifier.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        band_drop_rate: Rate at which bands are dropped in the stem.
        pos_drop_rate: Dropout rate after the positions.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    out_indices = (0, 1, 2)
    decays_tables = True
    renames = (
        (r"^levels\.(\d)\.\d+\.(?=conv\.|norm\.|reduction\.)", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
        (r"^levels\.(\d)\.", r"stages.\1.blocks."),
        (r"^(?=pos_embed$|spectral_conv\.|spectral_attention\.|patch_embed\.)", "stages.0.downsample."),
    )

    def __init__(
        self,
        img_size: int = 15,
        dim: int = 96,
        depths: Sequence[int] = (3, 4, 19),
        heads: Sequence[int] = (4, 8, 16),
        window: int = 7,
        mixers: Spec | Sequence | None = None,
        rank: int = 16,
        alpha: float = 32.0,
        freeze: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        band_drop_rate: float = 0.1,
        pos_drop_rate: float = 0.1,
        **kwargs,
    ):
        adapter: Any = {"rank": rank, "alpha": alpha, "freeze": freeze}
        specs = parse_mixers({"name": "lora_window", "window": window} | adapter if mixers is None else mixers, depths)
        dims, strides, rates = stage_layout(dim, depths, drop_path_rate, 2)
        stages = []
        for i, width in enumerate(dims):
            stem = SpectralStem(width, img_size, band_drop_rate, pos_drop_rate) if i == 0 else Downsample(dims[i - 1])
            ops, contexts = create_ops(specs[i], width, heads[i], stage=i, stride=strides[i])
            blocks = [Block(width, op, rate, **adapter) for op, rate in zip(ops, rates[i], strict=True)]
            stages.append(Stage(stem, blocks, contexts))
        self.adapter = adapter
        norm = LayerNorm2d(dims[-1], eps=1e-5)
        super().__init__(stages, dims, strides, norm, in_chans=in_chans, num_classes=num_classes, **kwargs)
        self.apply(init_weights)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the final features and the maps, as the base class does; images of odd sides get a row or column of 0.

        The stem drops the last row and column of such images, so that its maps would not cover them.
        """
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return super().forward_intermediates(x, *args, **kwargs)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights under our names; those of the convolutions over bands lose a dimension."""
        renamed = super().checkpoint_filter(state)
        return {name: value.flatten(3) if value.ndim == 5 else value for name, value in renamed.items()}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if num_classes:
            weight = self.head.get_parameter("weight")
            head = LoRALinear(self.num_features, num_classes, gated=False, **self.adapter)
            self.head = head.apply(init_weights).to(weight.device, weight.dtype)


_CFG = imagenet_cfg(
    input_size=(3, 15, 15), pool_size=None, crop_pct=1.0, first_conv="stages.0.downsample.patch_embed.0",
)  # fmt: skip
default_cfgs = generate_default_cfgs({"lola_specvit_nano": _CFG, "lola_specvit": _CFG})


@register_model
def lola_specvit_nano(pretrained: bool = False, **kwargs) -> LoLASpecViT:
    """Return a small net of our own for CPUs; 32 pixels give maps of 16, 8 and 4 tokens a side."""
    arguments = {"img_size": 32, "dim": 16, "depths": (1, 2, 1), "heads": (1, 2, 4), "rank": 4, "alpha": 8.0}
    return LoLASpecViT.build("lola_specvit_nano", pretrained, **arguments | kwargs)


@register_model
def lola_specvit(pretrained: bool = False, **kwargs) -> LoLASpecViT:
    return LoLASpecViT.build("lola_specvit", pretrained, **kwargs)
