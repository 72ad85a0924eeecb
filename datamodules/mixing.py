"""Mixing of the images of a batch with each other, and of their labels: MixUp, CutMix and MaskMix.

MixUp (arXiv:1710.09412) and CutMix (arXiv:1905.04899) are those of timm's Mixup in mode "batch". MaskMix is a part of
MixPro (Zhao et al., ICLR 2023, arXiv:2304.12043), written after the paper and the authors' repository, fistyee/MixPro
(MIT).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from torch import Tensor

from datamodules.batch_ops import send
from retinue.utils.arithmetic import ceil_div


@dataclass(frozen=True, kw_only=True)
class MaskMix:
    """Settings of MaskMix, which mixes two images in the cells of a grid.

    Attributes:
        alpha: alpha of the beta distribution that the share of an image's own cells comes from.
        cell: side of a cell in pixels; the paper has 28, 56 and 112 for images of 224 pixels.
        prob: probability that a batch is mixed in this way, not by MixUp or CutMix.
    """

    alpha: float = 1.0
    cell: int = 56
    prob: float = 0.5


class Mix(NamedTuple):
    """How the images of a batch were mixed.

    Attributes:
        kind: mixup, cutmix or maskmix; None if the batch was left as it is.
        partner: int64 (B,), position in the batch of the image that each image is mixed with.
        own: float32 (B, 1, H, W), share of each pixel that is the image's own.
        share: share of the image's own label.
    """

    kind: str | None
    partner: Tensor
    own: Tensor
    share: float

    def targets(self, label: Tensor, num_classes: int, smoothing: float) -> Tensor:
        """Return mixed labels, float32 (B, K), of labels (B,), which are smoothed, or of several labels each (B, K)."""
        smooth = label.float() if label.ndim == 2 else smooth_labels(label, num_classes, smoothing)
        return smooth * self.share + smooth[self.partner] * (1 - self.share)


def smooth_labels(label: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Return labels (B,) as float32 (B, K), of which the share `smoothing` is spread over all classes."""
    return mixup_target(label, num_classes, 1.0, smoothing)


def mix_images(image: Tensor, augment: Any) -> Mix:
    """Mix the images of a batch in place; all random numbers come from the global generators.

    Args:
        image: float32 (B, C, H, W).
        augment: `datamodules.transforms.Augment`, of which `mixup`, `cutmix`, `mixup_prob`, `switch_prob` and `maskmix`
            apply.
    """
    masks = augment.maskmix
    if masks is not None and np.random.rand() < masks.prob:
        return mix_in_cells(image, masks)
    b, _, h, w = image.shape
    partner = torch.arange(b, device=image.device).flip(0)
    own = image.new_ones(1, 1, h, w)
    if not (augment.mixup or augment.cutmix) or np.random.rand() >= augment.mixup_prob:
        return Mix(None, partner, own.expand(b, -1, -1, -1), 1.0)
    use_cutmix = augment.cutmix > 0 and (augment.mixup == 0 or np.random.rand() < augment.switch_prob)
    alpha = augment.cutmix if use_cutmix else augment.mixup
    share = np.random.beta(alpha, alpha)
    if use_cutmix:
        (top, bottom, left, right), share = cutmix_bbox_and_lam(image.shape, share)
        _replace_by_reversed(image[..., top:bottom, left:right])
        own[..., top:bottom, left:right] = 0
    else:
        _blend_with_reversed(image, 1 - share)
        own.fill_(share)
    return Mix("cutmix" if use_cutmix else "mixup", partner, own.expand(b, -1, -1, -1), float(share))


def mix_in_cells(image: Tensor, settings: MaskMix, partner: Tensor | None = None) -> Mix:
    """Mix a batch in place by MaskMix.

    All images keep the same number of cells, and each its own choice of cells. The label's share counts whole cells,
    also those that the image's edge cuts, as in the authors' code.

    Args:
        image: float32 (B, C, H, W).
        settings: alpha and side of a cell.
        partner: int64 (B,), position of the image that each image is mixed with; None draws a permutation.
    """
    b, _, h, w = image.shape
    partner = torch.randperm(b) if partner is None else partner
    rows, columns = ceil_div(h, settings.cell), ceil_div(w, settings.cell)
    kept = int(np.ceil(rows * columns * np.random.beta(settings.alpha, settings.alpha)))
    cells = np.zeros((b, 1, rows * columns), np.float32)
    for row in cells:
        row[0, np.random.permutation(rows * columns)[:kept]] = 1
    own = send(cells.reshape(b, 1, rows, columns), image.device)
    own = own.repeat_interleave(settings.cell, 2).repeat_interleave(settings.cell, 3)[..., :h, :w]
    partner = send(partner.numpy(), image.device)
    image.copy_(torch.where(own > 0, image, image[partner]))
    return Mix("maskmix", partner, own, kept / (rows * columns))


def _reversed_pairs(image: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Return images i and B - 1 - i of a batch for each i below B / 2: one pair at a time stays in a CPU's cache."""
    return zip(image[: len(image) // 2], reversed(image.unbind()), strict=False)


def _replace_by_reversed(image: Tensor) -> None:
    """Compute image.flip(0) in place."""
    if image.device.type == "cpu":
        for first, last in _reversed_pairs(image):
            kept = first.clone()
            first.copy_(last)
            last.copy_(kept)
    else:
        image.copy_(image.flip(0))


def _blend_with_reversed(image: Tensor, share: float) -> None:
    """Compute image.lerp(image.flip(0), share) in place."""
    if image.device.type == "cpu":
        for first, last in _reversed_pairs(image):
            change = (last - first).mul_(share)
            first.add_(change)
            last.sub_(change)
    else:
        image.add_((image.flip(0) - image).mul_(share))
