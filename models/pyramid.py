"""Simple feature pyramid: maps of several strides from the maps of a plain net, which all have one stride.

Paper: Exploring Plain Vision Transformer Backbones for Object Detection (ViTDet; Li et al., ECCV 2022,
arXiv:2203.16527), written after its text; weights of the authors' repository, facebookresearch/detectron2 (Apache-2.0),
load. Segmentors such as BEiT's (Bao et al., ICLR 2022, arXiv:2106.08254) resize
the maps of four blocks instead of the last map four times.
"""

import math
import re
from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn

# Strides of a detector's or segmentor's maps relative to the image, in pixels
STRIDES = (4, 8, 16, 32)


class SimplePyramid(nn.Module):
    """Each level resizes a map (B, dim, H, W) by a power of 2.

    Transposed convolutions enlarge it and halve the channels, with a norm and GELU between two of them; pooling
    reduces it.

    Args:
        dim: Number of channels of the maps.
        stride: Stride of the maps relative to the image, in pixels; a power of 2.
        maps: Number of maps: 1, or one for each level.
        min_stride: Smallest stride of a level, in pixels.

    Attributes:
        strides: Stride of each level, in pixels.
        channels: Number of channels of each level.

    Raises:
        ValueError: The number of maps is another one.
    """

    def __init__(self, dim: int, stride: int, maps: int = 1, min_stride: int = 4):
        super().__init__()
        self.strides = [level for level in STRIDES if level >= min_stride]
        if maps not in (1, len(self.strides)):
            raise ValueError(f"out_indices must name 1 or {len(self.strides)} maps of a plain net, not {maps}")
        self.channels, levels = [], []
        for level in self.strides:
            width, layers = dim, []
            for _ in range(round(math.log2(max(stride // level, 1)))):
                layers += [LayerNorm2d(width), nn.GELU()] if layers else []
                layers.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
                width //= 2
            if level > stride:
                layers.append(nn.MaxPool2d(level // stride, ceil_mode=True))
            levels.append(nn.Sequential(*layers))
            self.channels.append(width)
        self.levels = nn.ModuleList(levels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return one map for each level, (B, channels[i], H * stride / strides[i], W * stride / strides[i])."""
        sources = maps if len(maps) > 1 else list(maps) * len(self.levels)
        return [level(source) for level, source in zip(self.levels, sources, strict=True)]

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a backbone's weights with detectron2's names of a pyramid, `simfp_2.0.weight`, as `pyramid.<name>`.

        The convolutions that detectron2 applies to the levels afterwards are left out.
        """
        own, result = set(self.state_dict()), {}
        levels = {str(round(math.log2(stride))): i for i, stride in enumerate(self.strides)}
        for key, value in state.items():
            match = re.match(r"simfp_(\d)\.", key)
            name = f"levels.{levels.get(match[1])}.{key[match.end() :]}" if match else None
            if name is None or name in own:
                result[key if name is None else f"pyramid.{name}"] = value
        return result
