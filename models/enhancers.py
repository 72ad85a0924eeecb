"""Enhancers of images, which stand in front of a backbone and are trained with it.

An enhancer takes images (B, 3, H, W), as the backbone receives them, and returns images of the same shape.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Channels of the features, heads that weigh two scales of them, and width of the hidden layers.
CHANNELS, HEADS, HIDDEN = 24, 8, 32
# Smallest side of an image, in pixels, of which FeatEnHancer's convolutions leave one position.
MIN_SIDE = 15


class FeatEnHancer(nn.Module):
    """Hierarchical enhancement of dark images by features of three scales.

    Paper: FeatEnHancer: Enhancing Hierarchical Features for Object Detection and Beyond Under Low-Light Vision (Hashmi
    et al., ICCV 2023, arXiv:2308.03594). Written after a description of the method alone, since the licence of the
    authors' repository, https://github.com/khurramHashmi/FeatEnHancer (CC BY-NC-ND 4.0), permits no derivatives;
    weights under the authors' names load.

    One net computes features of the image, of a quarter and of an eighth of it. At each position, heads weigh the
    features of the image and of the quarter by their similarity with the quarter, and the weighted sum is added to the
    features of the image. These features and those of the eighth give eight residual images, whose sum is added to the
    image.

    Takes images (B, 3, H, W) with sides of at least 15 pixels and returns images of the same shape.

    Raises:
        ValueError: A forward pass receives a smaller image.
    """

    renames = (
        (r"^e_(conv\d)\.", r"features.\1."),
        (r"^quarter_conv\.", "quarter."),
        (r"^hexa_conv\.", "eighth."),
        (r"^scale_aware_aggregation\.query_conv1\.", "aggregation.reduce_full.0."),
        (r"^scale_aware_aggregation\.query_conv2\.", "aggregation.reduce_full.1."),
        (r"^scale_aware_aggregation\.key_conv\.", "aggregation.reduce_quarter."),
        (r"^ue_conv8\.", "residual.0."),
        (r"^ue_conv9\.", "residual.1."),
    )

    def __init__(self):
        super().__init__()
        self.quarter = nn.Conv2d(3, 3, 7, stride=4)
        self.eighth = nn.Conv2d(3, 3, 3, stride=2)
        self.features = ScaleFeatures()
        self.aggregation = ScaleAggregation()
        self.residual = nn.Sequential(
            nn.Conv2d(2 * CHANNELS, HIDDEN, 3, padding=1), nn.Conv2d(HIDDEN, CHANNELS, 3, padding=1), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < MIN_SIDE:
            raise ValueError(f"FeatEnHancer needs images of at least {MIN_SIDE} pixels, not {tuple(x.shape[2:])}")
        quarter = self.quarter(x)
        full = self.aggregation(F.relu(self.features(x)), F.relu(self.features(quarter)))
        coarse = resize(self.features(self.eighth(quarter)), x.shape[2:])
        residuals = self.residual(torch.cat((full, coarse), dim=1))
        return x + residuals.unflatten(1, (-1, 3)).sum(1)


class ScaleFeatures(nn.Module):
    """Net of seven convolutions, whose last three also read the outputs of the first three, in reverse order.

    Maps images (B, 3, H, W) of one scale to features (B, 24, H, W), without a last activation.
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, HIDDEN, 3, padding=1)
        self.conv2, self.conv3, self.conv4 = (nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1) for _ in range(3))
        self.conv5, self.conv6 = (nn.Conv2d(2 * HIDDEN, HIDDEN, 3, padding=1) for _ in range(2))
        self.conv7 = nn.Conv2d(2 * HIDDEN, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.conv1(x))
        second = F.relu(self.conv2(first))
        third = F.relu(self.conv3(second))
        x = F.relu(self.conv4(third))
        x = F.relu(self.conv5(torch.cat((third, x), dim=1)))
        x = F.relu(self.conv6(torch.cat((second, x), dim=1)))
        return self.conv7(torch.cat((first, x), dim=1))


class ScaleAggregation(nn.Module):
    """Scale-aware aggregation: attention of each position to two scales at the same position.

    Takes features of the image (B, 24, H, W) and of its quarter, and returns features (B, 24, H, W). Both are reduced
    to an eighth of the image, where the reduced quarter is the query and both scales are keys and values.
    """

    def __init__(self):
        super().__init__()
        self.reduce_full = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 7, stride=4), nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2)
        )
        self.reduce_quarter = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2)

    def forward(self, full: Tensor, quarter: Tensor) -> Tensor:
        query = self.reduce_quarter(quarter)
        # (B, scale, head, channel, H / 8, W / 8)
        scales = torch.stack((self.reduce_full(full), query), dim=1).unflatten(2, (HEADS, -1))
        scores = (scales * query.unflatten(1, (HEADS, -1))[:, None]).sum(3, keepdim=True)
        weights = (scores / math.sqrt(CHANNELS // HEADS)).softmax(dim=1)
        mixed = (weights * scales).sum(1).flatten(1, 2)
        return full + resize(mixed, full.shape[2:])


def resize(x: Tensor, size: torch.Size) -> Tensor:
    """Resize maps (B, C, h, w) bilinearly to `size`, so that the corners' centres keep their places."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


# Enhancers by name, the argument `enhancer` of `models.DenseBackbone`.
ENHANCERS: dict[str, Callable[[], nn.Module]] = {"featenhancer": FeatEnHancer}
