"""Features of several views of an image, which may differ in size."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


def pooled(net: Any, image: Tensor) -> Tensor:
    """Return the features (B, D) of images (B, C, H, W) that the net's classifier would read."""
    return net.forward_head(net.forward_features(image), pre_logits=True)


def pooled_views(net: Any, views: Sequence[dict[str, Tensor]]) -> Tensor:
    """Return the features (V · B, D) of V views, one view after another; neighbours of one size pass together.

    Args:
        net: Net with timm's interface.
        views: Views of B images, whose `image` is (B, C, h, w).
    """
    groups = groupby([view["image"] for view in views], key=lambda image: image.shape[2:])
    return torch.cat([pooled(net, torch.cat(list(images))) for _, images in groups])
