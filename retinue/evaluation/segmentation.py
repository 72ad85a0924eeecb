"""What a segmentor's predictions are worth: intersection over union, and accuracy of pixels and classes."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retinue.utils.files import replacing
from retinue.utils.masks import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

FIGURES = ("miou", "pixel_accuracy", "mean_accuracy")


def confusion_matrix(prediction: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """(K, K) int64: at [t, p] the pixels of class t that were taken for p; `prediction` and `mask` are of one shape."""
    seen = mask != IGNORED
    pairs = mask[seen].long() * num_classes + prediction[seen]
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


class PixelCounts:
    """Pixels of a test set: `confusion` (K, K) of all images, and `areas` (3, K) of each by its place in the set."""

    def __init__(self, num_classes: int):
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self.areas: dict[int, np.ndarray] = {}

    def add(self, index: int, confusion: np.ndarray) -> None:
        self.confusion += confusion
        self.areas[index] = areas(confusion)

    def merge(self, other: PixelCounts) -> None:
        """Add the images of another process."""
        self.confusion += other.confusion
        self.areas |= other.areas


def areas(confusion: np.ndarray) -> np.ndarray:
    """(3, K): of each class the pixels that are right, that are predicted, and that there are."""
    return np.stack([confusion.diagonal(), confusion.sum(0), confusion.sum(1)])


def class_iou(areas: np.ndarray) -> np.ndarray:
    """(K,): NaN for a class that is neither in the truth nor predicted."""
    right, predicted, true = areas
    return _divide(right, predicted + true - right)


def class_accuracy(areas: np.ndarray) -> np.ndarray:
    """(K,): the share of a class's pixels that is right; NaN for a class without any."""
    right, _, true = areas
    return _divide(right, true)


def figures(areas: np.ndarray) -> dict[str, float]:
    """`miou` (over the classes that are in the truth or predicted), `pixel_accuracy`, `mean_accuracy` (over the classes
    in the truth), as mmsegmentation's mIoU, aAcc and mAcc.

    Raises:
        ValueError: no pixel has a class.
    """
    if not areas[2].sum():
        raise ValueError(f"there is nothing to evaluate: all pixels of the masks are {IGNORED}, which is ignored")
    return dict(zip(FIGURES, _rates(areas).tolist(), strict=True))


def summarize(
    counts: PixelCounts, class_names: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """What to report of a test set, ready for JSON; rates are fractions of 1.

    `figures`, each with `<name>_ci95` [low, high] by a bootstrap over the images, None for one image; `n` images;
    `ci_methods`; `per_class`: {name: {iou, accuracy, pixels}}, None where a rate has no pixels to speak of.

    Raises:
        ValueError: no pixel has a class.
    """
    images = np.stack([counts.areas[index] for index in sorted(counts.areas)])  # (N, 3, K)
    total = images.sum(0)
    intervals = _bootstrap(images, resamples, seed) if len(images) > 1 else [None] * len(FIGURES)
    intervals = {f"{name}_ci95": interval for name, interval in zip(FIGURES, intervals, strict=True)}
    return {
        "n": len(images),
        **figures(total),
        **intervals,
        "ci_methods": dict.fromkeys(FIGURES, f"percentile bootstrap over images, {resamples} resamples, seed {seed}"),
        "per_class": {
            name: {"iou": _or_none(iou), "accuracy": _or_none(accuracy), "pixels": int(pixels)}
            for name, iou, accuracy, pixels in zip(
                class_names, class_iou(total), class_accuracy(total), total[2], strict=True
            )
        },
    }


def write_iou_csv(path: str | Path, counts: PixelCounts, class_names: Sequence[str]) -> None:
    """Columns class, iou, accuracy (empty where there is none), true_pixels, predicted_pixels."""
    total = areas(counts.confusion)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "iou", "accuracy", "true_pixels", "predicted_pixels"])
        rows = zip(class_names, class_iou(total), class_accuracy(total), total[2], total[1], strict=True)
        for name, *rates, true, predicted in rows:
            writer.writerow([name, *("" if math.isnan(rate) else f"{rate:.6g}" for rate in rates), true, predicted])


def _bootstrap(images: np.ndarray, resamples: int, seed: int) -> list[list[float]]:
    """95 % intervals of the figures: the images are drawn anew, and their pixels summed up."""
    n, (_, *shape) = len(images), images.shape
    flat = images.reshape(n, -1).astype(np.float64)  # (N, 3 K); a float holds whole numbers up to 2^53
    rng = np.random.default_rng(seed)
    drawn = np.empty((resamples, len(FIGURES)))
    for i in range(resamples):
        times = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
        drawn[i] = _rates((times @ flat).reshape(shape))
    return np.nanpercentile(drawn, [2.5, 97.5], axis=0).T.tolist()


def _rates(areas: np.ndarray) -> np.ndarray:
    """The `FIGURES`, NaN without a pixel."""
    if not areas[2].sum():
        return np.full(len(FIGURES), np.nan)
    right, _, true = areas
    return np.array([np.nanmean(class_iou(areas)), right.sum() / true.sum(), np.nanmean(class_accuracy(areas))])


def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, where=whole > 0, out=np.full(len(whole), np.nan))


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
