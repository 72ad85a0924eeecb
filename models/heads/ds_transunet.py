"""DS-TransUNet: a second, coarser backbone, transformer interactive fusion (TIF) and a U-Net decoder of Swin blocks.

Paper: DS-TransUNet: Dual Swin Transformer U-Net for Medical Image Segmentation (Lin et al., IEEE Transactions on
Instrumentation and Measurement 2022, arXiv:2106.06716). Written after the paper and the authors' repository,
https://github.com/TianBaoGe/DS-TransUNet (no licence file), of which no code is used.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from models.backbones.swin import shifted_window_blocks
from models.dense import DenseBackbone, four_channels, four_maps
from retinue.utils.sizes import resolve

# The authors' coarse backbone; the patches of their fine backbone are 4 pixels wide.
SWIN_TINY = {"name": "swin_tiny", "patch": 8, "drop_path_rate": 0.2}


class TransformerLayer(nn.Module):
    """Attention between all tokens (B, N, dim) and MLP, each normalised before and added to the tokens.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        head_dim: Number of channels of a head.
        hidden: Number of hidden channels of the MLP.
    """

    renames = (
        (r"^layers\.0\.0\.norm\.", "norm1."),
        (r"^layers\.0\.0\.fn\.to_qkv\.", "attn.qkv."),
        (r"^layers\.0\.0\.fn\.to_out\.0\.", "attn.proj."),
        (r"^layers\.0\.1\.norm\.", "norm2."),
        (r"^layers\.0\.1\.fn\.net\.0\.", "mlp.fc1."),
        (r"^layers\.0\.1\.fn\.net\.3\.", "mlp.fc2."),
    )

    def __init__(self, dim: int, num_heads: int, head_dim: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, attn_head_dim=head_dim)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class InteractiveFusion(nn.Module):
    """Let the tokens of each of two maps attend to one another and to the mean token of the other map (TIF).

    Takes a fine map (B, fine_dim, H, W) and a coarse map (B, coarse_dim, h, w) of any sizes, and returns both. Cost is
    quadratic in H * W.

    Args:
        fine_dim: Number of channels of the fine map.
        coarse_dim: Number of channels of the coarse map.
    """

    renames = (
        (r"^transformer_s\.", "coarse_layer."),
        (r"^transformer_l\.", "fine_layer."),
        (r"^norm_s\.", "coarse_norm."),
        (r"^norm_l\.", "fine_norm."),
        (r"^linear_s\.", "coarse_to_fine."),
        (r"^linear_l\.", "fine_to_coarse."),
    )

    def __init__(self, fine_dim: int, coarse_dim: int):
        super().__init__()
        self.fine_layer = TransformerLayer(fine_dim, num_heads=1, head_dim=64, hidden=256)
        self.coarse_layer = TransformerLayer(coarse_dim, num_heads=3, head_dim=32, hidden=128)
        self.fine_norm, self.coarse_norm = nn.LayerNorm(fine_dim), nn.LayerNorm(coarse_dim)
        self.fine_to_coarse = nn.Linear(fine_dim, coarse_dim)
        self.coarse_to_fine = nn.Linear(coarse_dim, fine_dim)

    def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        fine_tokens, coarse_tokens = fine.flatten(2).transpose(1, 2), coarse.flatten(2).transpose(1, 2)
        for_coarse = self.fine_to_coarse(self.fine_norm(fine_tokens).mean(1, keepdim=True))
        for_fine = self.coarse_to_fine(self.coarse_norm(coarse_tokens).mean(1, keepdim=True))
        fine_tokens = self.fine_layer(torch.cat((for_fine, fine_tokens), dim=1))[:, 1:]
        coarse_tokens = self.coarse_layer(torch.cat((for_coarse, coarse_tokens), dim=1))[:, 1:]
        return fine_tokens.transpose(1, 2).reshape(fine.shape), coarse_tokens.transpose(1, 2).reshape(coarse.shape)


def conv_norm_relu(in_dim: int, dim: int) -> list[nn.Module]:
    """Return a 3 x 3 convolution, group norm with 32 groups (fewer if these do not divide `dim`), and ReLU."""
    return [nn.Conv2d(in_dim, dim, 3, padding=1), nn.GroupNorm(math.gcd(32, dim), dim), nn.ReLU()]


def enlarge(x: Tensor, like: Tensor) -> Tensor:
    """Resize a map (B, C, h, w) to height and width of `like`, by nearest neighbours."""
    return F.interpolate(x, like.shape[2:], mode="nearest")


class ConvStep(nn.Module):
    """One step of the decoder: enlarge a map by a convolution, and join it with a skip map.

    Takes maps (B, dim, h, w) and (B, dim / 2, H, W), and returns a map (B, dim / 2, H, W).

    Args:
        dim: Number of channels, a multiple of 2.
    """

    renames = ((r"^up\.up\.(\d)\.", lambda match: f"up.{int(match[1]) - 1}."), (r"^conv_relu\.0\.", "join."))

    def __init__(self, dim: int):
        super().__init__()
        self.up = nn.Sequential(*conv_norm_relu(dim, dim // 2))
        self.join = nn.Conv2d(dim, dim // 2, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(enlarge(x, skip))
        return F.relu(self.join(torch.cat((skip, x), dim=1)))


class SwinStep(nn.Module):
    """One step of the decoder: enlarge a map, run two Swin blocks, and join it with a skip map.

    Takes maps (B, dim, h, w) and (B, dim / 2, H, W), and returns a map (B, dim / 2, H, W). Both maps are reduced to
    dim / 4 channels before they are joined.

    Args:
        dim: Number of channels, a multiple of 4 and of twice `num_heads`.
        num_heads: Number of heads of the Swin blocks.
        window: Side of a window of the Swin blocks in tokens.
        drop_path_rate: Drop path rate of the second block.
    """

    renames = (
        (r"^up\.layer\.blocks\.(\d)\.attn\.", r"blocks.\1.mixer."),
        (r"^up\.layer\.", ""),
        (r"^up\.up\.up\.(\d)\.", lambda match: f"up.{int(match[1]) - 1}."),
        (r"^up\.conv_relu\.0\.", "reduce."),
        (r"^conv2\.0\.", "reduce_skip."),
        (r"^conv_relu\.0\.", "join."),
    )

    def __init__(self, dim: int, num_heads: int, window: int, drop_path_rate: float):
        super().__init__()
        self.up = nn.Sequential(*conv_norm_relu(dim, dim // 2))
        self.blocks = shifted_window_blocks(dim // 2, num_heads, window, (0.0, drop_path_rate))
        self.reduce = nn.Conv2d(dim // 2, dim // 4, 1)
        self.reduce_skip = nn.Conv2d(dim // 2, dim // 4, 1)
        self.join = nn.Conv2d(dim // 2, dim // 2, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.blocks(self.up(enlarge(x, skip)))
        x, skip = F.relu(self.reduce(x)), F.relu(self.reduce_skip(skip))
        return F.relu(self.join(torch.cat((skip, x), dim=1)))


class DSTransUNetHead(nn.Module):
    """DS-TransUNet without its fine backbone: images and four maps of the fine backbone to logits.

    Takes maps (B, in_channels[i], ⌈H / 4 / 2^i⌉, ⌈W / 4 / 2^i⌉) and images (B, in_chans, H, W). Returns logits
    (B, num_classes, H, W), and for the training two auxiliary logits of strides 32 and 4, weighted by `output_weights`.
    As in the authors' code, auxiliary logits are at least 0.

    The coarse backbone reads the same images, and its maps have strides 8 and more. By default this is Swin-T with
    patches of 8 pixels, as in the paper. A net without larger patches gives its maps from stride 8 on; if these are
    fewer than four, the last one is subsampled. The coarse backbone is a part of the decoder, so layer decay and
    `recipe.optimizer.backbone_factor` do not apply to it.

    A map that is not longer than a window is one window here, whereas the authors pad it and shift its windows.

    Args:
        in_channels: Numbers of channels of the fine backbone's maps of strides 4, 8, 16 and 32.
        num_classes: Number of classes.
        in_chans: Number of image channels.
        coarse: Registry name of the coarse backbone, or a mapping of its `name` and arguments; null ones are left out.
            Released weights of Swin do not fit patches of 8 pixels.
        channels: Width of the decoder at stride 4, a multiple of 4; each coarser stride has twice as many.
        window: Side of a window of the Swin blocks in tokens.
        drop_path_rate: Drop path rate of the second Swin block of each step.

    Raises:
        ValueError: There are not four maps, `channels` is not such a multiple, or the coarse backbone's name or one of
            its arguments is unknown.
    """

    reads_image = True
    output_weights = (0.6, 0.2, 0.2)
    renames = (
        (r"^encoder\.", None),
        (r"^encoder2\.norm(\d)\.", r"coarse.norms.\1."),
        (r"^encoder2\.", "coarse.net."),
        (r"^cross_att_(\d)\.", lambda match: f"exchanges.{int(match[1]) - 1}."),
        (r"^change(\d)\.conv\.", lambda match: f"fusions.{int(match[1]) - 1}."),
        (r"^down1\.", "stems.0."),
        (r"^down2\.conv\.", "stems.1."),
        (r"^layer(\d)\.", lambda match: f"steps.{int(match[1]) - 1}."),
        (r"^loss(\d)\.0\.", lambda match: f"auxiliary.{int(match[1]) - 1}."),
        (r"^final\.", "classifier."),
    )

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        in_chans: int = 3,
        coarse: str | Mapping[str, Any] = SWIN_TINY,
        channels: int = 128,
        window: int = 7,
        drop_path_rate: float = 0.2,
    ):
        super().__init__()
        if len(in_channels) != 4:
            raise ValueError(f"DSTransUNetHead reads four maps, of strides 4, 8, 16 and 32, not {len(in_channels)}")
        if channels % 4:
            raise ValueError(f"DSTransUNetHead's channels must be a multiple of 4, not {channels}")
        name, args = resolve({"name": coarse} if isinstance(coarse, str) else coarse, 0, under_head=True)
        defaults = {"norms": None, "min_stride": 8, "in_chans": in_chans, "simple_pyramid": True}
        self.coarse = DenseBackbone(name, **defaults | args)
        coarse_channels = four_channels(self.coarse)
        self.exchanges, self.fusions = nn.ModuleList(), nn.ModuleList()
        for i, (fine_dim, coarse_dim) in enumerate(zip(in_channels, coarse_channels, strict=True)):
            width = channels * 2**i
            self.exchanges.append(InteractiveFusion(fine_dim, coarse_dim))
            convs = conv_norm_relu(fine_dim + coarse_dim, width) + conv_norm_relu(width, width)
            self.fusions.append(nn.Sequential(*convs))
        half, quarter = channels // 2, channels // 4
        halve = nn.MaxPool2d(2, ceil_mode=True), *conv_norm_relu(quarter, half), *conv_norm_relu(half, half)
        self.stems = nn.ModuleList([nn.Conv2d(in_chans, quarter, 1), nn.Sequential(*halve)])
        self.steps = nn.ModuleList(SwinStep(factor * channels, factor, window, drop_path_rate) for factor in (8, 4, 2))
        self.steps.extend([ConvStep(channels), ConvStep(half)])
        self.classifier = nn.Conv2d(quarter, num_classes, 1)
        self.auxiliary = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for width in (8 * channels, channels))

    def forward(self, maps: Sequence[Tensor], image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Maps of strides 1 to 32
        skips = [self.stems[0](image)]
        skips.append(self.stems[1](skips[0]))
        coarse_maps = four_maps(self.coarse(image))
        for fine, coarse, exchange, fuse in zip(maps, coarse_maps, self.exchanges, self.fusions, strict=True):
            fine, coarse = exchange(fine, coarse)
            skips.append(fuse(torch.cat((fine, enlarge(coarse, fine)), dim=1)))
        # Decoded maps of strides 32 to 1
        decoded = [skips.pop()]
        for step, skip in zip(self.steps, reversed(skips), strict=True):
            decoded.append(step(decoded[-1], skip))
        deep, shallow = (F.relu(conv(decoded[i])) for conv, i in zip(self.auxiliary, (0, 3), strict=True))
        return self.classifier(decoded[-1]), deep, shallow
