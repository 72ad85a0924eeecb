"""IML-ViT's decoder, which localises manipulated regions of an image, and its loss of the regions' edges.

Paper: IML-ViT: Benchmarking Image Manipulation Localization by Vision Transformer (Ma et al., 2023, arXiv:2307.14863).
Written after the paper and the authors' repository, https://github.com/SunnyHaze/IML-ViT (MIT), whose checkpoints load.
The paper's backbone is `model=vitdet model.size=base`; the decoder reads any backbone's maps.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from retinue.utils.masks import IGNORED
from retinue.utils.suggestions import nearest

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "instance": lambda width: nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
    "layer": LayerNorm2d,
}


class PredictHead(nn.Module):
    """Predictor that reads all levels of a pyramid at the size of the finest one.

    Takes maps (B, in_channels[i], H_i, W_i), finest first, and returns (B, outputs, H_0, W_0).

    Args:
        in_channels: Number of channels of each level.
        outputs: Number of output channels.
        channels: Width of the layer between the levels and the output.
        norm: Norm after this layer: "batch", "instance" or "layer".
        dropout: Probability of dropping a value before the output.

    Raises:
        ValueError: The norm is unknown.
    """

    renames = ((r"^linear_fuse\.", "fuse."), (r"^linear_predict\.", "predict."))

    def __init__(
        self, in_channels: Sequence[int], outputs: int, channels: int = 256, norm: str = "batch", dropout: float = 0.5
    ):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be {', '.join(NORMS)}, not {norm!r}.{nearest(norm, NORMS)}")
        self.fuse = nn.Conv2d(sum(in_channels), channels, 1)
        self.norm = NORMS[norm](channels)
        self.dropout = nn.Dropout(dropout)
        self.predict = nn.Conv2d(channels, outputs, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        x = torch.cat([F.interpolate(x, size, mode="bilinear") for x in maps], dim=1)
        return self.predict(self.dropout(self.norm(self.fuse(x))))


class IMLHead(nn.Module):
    """IML-ViT's decoder: convolutions of each map of a pyramid, a fifth level, and `PredictHead`.

    Takes maps (B, in_channels[i], ⌈H / 4 / 2^i⌉, ⌈W / 4 / 2^i⌉) and returns logits (B, num_classes, ⌈H / 4⌉, ⌈W / 4⌉).

    With two classes there is one output channel, as in the paper: the logit of the second class, manipulated, while the
    logit of the first class is 0. Cross-entropy is then the paper's binary cross-entropy. More classes have a channel
    each.

    Args:
        in_channels: Numbers of channels of the maps, finest first.
        num_classes: Number of classes.
        channels: Width of the pyramid and of the predictor.
        norm: Norm of the predictor: "batch", "instance" or "layer".
        dropout: Probability of dropping a value before the output.
        edge_weight: Weight of the loss of the pixels at edges relative to the loss of all pixels.
        edge_width: Width of the edges in pixels, odd; `edges` says what it means.

    Raises:
        ValueError: The norm is unknown, or the width of the edges is not an odd number above 0.
    """

    # From the authors' names of the whole net, encoder and decoder, to the names of a segmentor.
    net_renames = (
        (r"^encoder_net\.", "backbone."),
        (r"^predict_head\.", "decode_head.predictor."),
        (r"^featurePyramid_net\.simfp_2\.4\.", "decode_head.levels.0.0."),
        (r"^featurePyramid_net\.simfp_2\.5\.", "decode_head.levels.0.2."),
        (r"^featurePyramid_net\.simfp_([35])\.1\.", lambda match: f"decode_head.levels.{int(match[1]) - 2}.0."),
        (r"^featurePyramid_net\.simfp_([35])\.2\.", lambda match: f"decode_head.levels.{int(match[1]) - 2}.2."),
        (r"^featurePyramid_net\.simfp_4\.0\.", "decode_head.levels.2.0."),
        (r"^featurePyramid_net\.simfp_4\.1\.", "decode_head.levels.2.2."),
        (r"^(decode_head\.levels\.\d)\.0\.norm\.", r"\1.1."),
        (r"^(decode_head\.levels\.\d)\.2\.norm\.", r"\1.3."),
        (r"^featurePyramid_net\.", "backbone."),
    )

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 256,
        norm: str = "batch",
        dropout: float = 0.5,
        edge_weight: float = 20.0,
        edge_width: int = 7,
    ):
        super().__init__()
        if edge_width < 1 or edge_width % 2 == 0:
            raise ValueError(f"edge_width must be an odd number of pixels, not {edge_width}")
        self.binary, self.edge_weight, self.edge_width = num_classes == 2, edge_weight, edge_width
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for width in in_channels
        )
        levels = len(in_channels) + 1
        self.predictor = PredictHead([channels] * levels, 1 if self.binary else num_classes, channels, norm, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = [level(x) for level, x in zip(self.levels, maps, strict=True)]
        logits = self.predictor([*levels, F.max_pool2d(levels[-1], 1, stride=2)])
        return torch.cat((torch.zeros_like(logits), logits), dim=1) if self.binary else logits

    def losses(self, logits: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the edge loss: cross-entropy summed over the pixels at edges, divided by the number of all pixels.

        Args:
            logits: (B, K, H, W).
            mask: Classes (B, H, W); pixels of 255 are ignored.
        """
        errors = F.cross_entropy(logits, mask, ignore_index=IGNORED, reduction="none")
        return {"loss_edge": self.edge_weight * (errors * edges(mask, self.edge_width)).mean()}


def edges(mask: Tensor, width: int) -> Tensor:
    """Return where edges are: a cross of `width` pixels by `width` pixels around the pixel holds two classes or more.

    For two classes the edges are the difference of the authors' dilation and erosion of the mask by such a cross.
    Ignored pixels are no edges and belong to no class.

    Args:
        mask: Classes (B, H, W); pixels of 255 are ignored.
        width: Length of the cross's arms from end to end, odd.

    Returns:
        Tensor of bool, (B, H, W).
    """
    classes, ignored = mask.float(), mask == IGNORED
    highest = dilate(classes.masked_fill(ignored, -torch.inf), width)
    lowest = -dilate((-classes).masked_fill(ignored, -torch.inf), width)
    return (highest > lowest) & ~ignored


def dilate(x: Tensor, width: int) -> Tensor:
    """Return the maximum over the cross of `width` pixels around each pixel, (B, H, W)."""
    vertical = F.max_pool2d(x, (width, 1), stride=1, padding=(width // 2, 0))
    return torch.maximum(vertical, F.max_pool2d(x, (1, width), stride=1, padding=(0, width // 2)))
