"""Effective receptive field (Luo et al., NeurIPS 2016, arXiv:1701.04128), as RepLKNet measures it (arXiv:2203.06717).

The definitions follow the authors' analysis, DingXiaoH/RepLKNet-pytorch (MIT).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retinue.evaluation.sight.blocks import split_tokens

# Shares of the contribution for which RepLKNet states the area.
THRESHOLDS = (0.2, 0.3, 0.5, 0.99)


def contributions(net: Any, images: Tensor, module: str) -> np.ndarray:
    """Return the contribution of each pixel to the central token of a map, float64 (h, w).

    It is the positive part of the gradient of the sum of the token's positive channels, summed over the images and
    their channels.

    Args:
        net: Net with timm's interface.
        images: Normalised images (B, C, h, w).
        module: Name of the module that returns the map.
    """
    images = images.detach().clone().requires_grad_()
    found: list[Tensor] = []
    handle = net.get_submodule(module).register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        net(images)
    finally:
        handle.remove()
    x = split_tokens(net, found[0], (images.shape[2], images.shape[3]))[0]
    center = x[:, x.shape[1] // 2, x.shape[2] // 2].relu().sum()
    (gradient,) = torch.autograd.grad(center, images)
    return gradient.relu().sum((0, 1)).double().cpu().numpy()


def covered_area(field: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> dict[float, float]:
    """Return the share of the image's area that holds each share of the contribution.

    The area is that of the smallest rectangle about the central pixel, of an odd side up to the image's.

    Args:
        field: Contributions (h, w), at least 0.
        thresholds: Shares of the contribution, from 0 to 1.

    Raises:
        ValueError: No pixel contributes.
    """
    h, w = field.shape
    total = field.sum()
    if not total > 0:
        raise ValueError("no pixel contributes to the central token: its positive channels have no gradient")
    steps = range(max(h, w))
    inside = [(max(h // 2 - i, 0), min(h // 2 + i + 1, h), max(w // 2 - i, 0), min(w // 2 + i + 1, w)) for i in steps]
    shares = [field[top:bottom, left:right].sum() / total for top, bottom, left, right in inside]
    areas = [(bottom - top) * (right - left) / (h * w) for top, bottom, left, right in inside]
    # A sum of many small numbers may differ from the total in the last digits.
    return {
        t: next(area for share, area in zip(shares, areas, strict=True) if share >= min(t, 1 - 1e-12))
        for t in thresholds
    }
