"""VWFormer's decoder: windows of a map attend to contexts of several sizes around them.

Paper: Multi-Scale Representations by Varying Window Attention for Semantic Segmentation (Yan et al., ICLR 2024,
arXiv:2404.16573). Written after the paper and the authors' repository, https://github.com/yan-hao-tian/VW (MIT), whose
checkpoints load.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.heads.upsample import create_upsample
from ops.attention.varying_window import GRID, RATIOS, CrossAttention, attend_to_contexts
from retinue.utils.arithmetic import padding


def conv_bn_relu(in_dim: int, dim: int, kernel: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_dim, dim, kernel, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(dim), nn.ReLU())


class VaryingWindowAttention(nn.Module):
    """Attention of each window of a map to a context around it, as in the op `varying_window`, with batch norms.

    Takes a map (B, D, h, w) and returns a map of the same shape; h and w are multiples of 8, since a map has 8 x 8
    windows.

    Args:
        dim: Number D of channels, a multiple of ratio² and of `num_heads`.
        num_heads: Number of attention heads.
        ratio: Side of the context relative to the side of the window: 2, 4 or 8.
        city: Use the authors' form for Cityscapes: PyTorch's attention without a norm after it.
    """

    def __init__(self, dim: int, num_heads: int, ratio: int, city: bool = False):
        super().__init__()
        self.ratio = ratio
        self.scale = conv_bn_relu(dim, dim // ratio**2, ratio)
        if city:
            self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
            self.norm = nn.Identity()
        else:
            self.attn = CrossAttention(dim, num_heads, dim)
            self.norm = nn.BatchNorm2d(dim)
            nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(attend_to_contexts(x, self.ratio, self.scale, self.attend).permute(0, 3, 1, 2))

    def attend(self, x: Tensor, context: Tensor) -> Tensor:
        if isinstance(self.attn, nn.MultiheadAttention):
            return self.attn(x, context, context, need_weights=False)[0]
        return self.attn(x, context)


class VWHead(nn.Module):
    """VWFormer's decoder: four maps of a backbone to logits at stride 4.

    Takes maps (B, in_channels[i], ⌈H / 4 / 2^i⌉, ⌈W / 4 / 2^i⌉) and returns logits (B, num_classes, ⌈H / 4⌉, ⌈W / 4⌉).

    The authors' code takes images whose sides are multiples of 64. For other images, the map at stride 8 is padded for
    the attention to multiples of 8, by replicating its right and bottom borders, and the attention's output is cropped.

    In training, batch norm needs at least two images per device, since one branch averages each image to one vector.

    Args:
        in_channels: Numbers of channels of the maps of strides 4, 8, 16 and 32.
        num_classes: Number of classes.
        channels: Width of the decoder, a multiple of 64 and of `num_heads`.
        num_heads: Number of attention heads.
        short_cut: Add each attention's input to its output. The authors' nets for Cityscapes do not.
        dropout: Probability of dropping a whole channel before the classifier.
        city: Use the authors' form for Cityscapes: convolution, batch norm and ReLU on the maps instead of a linear
            layer, nearest-neighbour upsampling, PyTorch's attention without a norm, and no branch of the mean.
        upsample: Upsampling from stride 8 to stride 4: "bilinear", as in the paper, or the "wau" or "expand" of
            `models/heads/upsample.py`, which reduce the map to the 48 channels of the finest one.

    Raises:
        ValueError: There are not four maps, `channels` is not such a multiple, or the upsampler is unknown.
    """

    renames = (
        (r"^linear_c(\d)\.(proj\.)?", lambda match: f"laterals.{int(match[1]) - 1}."),
        (r"^linear_fuse\.", "fuse."),
        (r"^ds\.(\d)\.", r"attention.\1.scale."),
        (r"^attn\.(\d)\.theta\.conv\.", r"attention.\1.attn.q."),
        (r"^attn\.(\d)\.phi\.conv\.", r"attention.\1.attn.k."),
        (r"^attn\.(\d)\.g\.conv\.", r"attention.\1.attn.v."),
        (r"^attn\.(\d)\.conv_out\.conv\.", r"attention.\1.attn.proj."),
        (r"^attn\.(\d)\.conv_out\.bn\.", r"attention.\1.norm."),
        (r"^attn\.(\d)\.", r"attention.\1.attn."),
        (r"^short_path\.", "local."),
        (r"^image_pool\.", "mean."),
        (r"^cat\.", "merge."),
        (r"^low_level_fuse\.", "refine."),
        (r"^conv_seg\.", "classifier."),
        (r"\.conv\.", ".0."),
        (r"\.bn\.", ".1."),
    )

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 512,
        num_heads: int = 1,
        short_cut: bool = True,
        dropout: float = 0.1,
        city: bool = False,
        upsample: str = "bilinear",
    ):
        super().__init__()
        if len(in_channels) != 4:
            raise ValueError(f"VWHead reads four maps, of strides 4, 8, 16 and 32, not {len(in_channels)}")
        multiple = max(RATIOS) ** 2
        if channels % multiple or channels % num_heads:
            raise ValueError(
                f"VWHead's channels must be a multiple of {multiple} and of its {num_heads} heads, not {channels}"
            )
        self.upsampling = "nearest" if city else "bilinear"
        self.short_cut = short_cut
        widths = (48, channels, channels, channels)
        self.laterals = nn.ModuleList(
            conv_bn_relu(in_dim, width) if city else nn.Conv2d(in_dim, width, 1)
            for in_dim, width in zip(in_channels, widths, strict=True)
        )
        self.fuse = conv_bn_relu(3 * channels, channels)
        self.local = conv_bn_relu(channels, channels)
        self.mean = None if city else nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_bn_relu(channels, channels))
        self.attention = nn.ModuleList(VaryingWindowAttention(channels, num_heads, ratio, city) for ratio in RATIOS)
        self.merge = conv_bn_relu((4 if city else 5) * channels, channels)
        self.upsample = None if upsample == "bilinear" else create_upsample(upsample, widths[0], channels)
        self.refine = conv_bn_relu(widths[0] + (channels if self.upsample is None else widths[0]), channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.get_parameter("bias"))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        finest, *maps = (lateral(x) for lateral, x in zip(self.laterals, maps, strict=True))
        h, w = maps[0].shape[2:]
        maps = [maps[0], *(F.interpolate(x, (h, w), mode=self.upsampling) for x in maps[1:])]
        x = self.fuse(torch.cat(maps[::-1], dim=1))

        branches = [self.local(x)]
        if self.mean is not None:
            branches.append(self.mean(x).expand_as(x))
        padded = F.pad(x, (0, padding(w, GRID[1]), 0, padding(h, GRID[0])), mode="replicate")
        for attention in self.attention:
            attended = attention(padded)[..., :h, :w]
            branches.append(attended + x if self.short_cut else attended)
        x = self.merge(torch.cat(branches, dim=1))

        size = finest.shape[2:]
        x = F.interpolate(x, size, mode="bilinear") if self.upsample is None else self.upsample(finest, x)
        return self.classifier(self.dropout(self.refine(torch.cat((x, finest), dim=1))))
