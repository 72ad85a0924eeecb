"""Evaluation of segmentation: intersection over union, and accuracy of pixels and classes."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retinue.evaluation.statistics import draw_images, percentile_intervals
from retinue.utils.files import replacing
from retinue.utils.masks import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

# Names of the figures, in the order of `rates`.
FIGURES = ("miou", "pixel_accuracy", "mean_accuracy")


def confusion_matrix(prediction: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each true and predicted class.

    Args:
        prediction: labels 0 to K - 1, of any shape.
        mask: true labels of the same shape, 0 to K - 1, or 255 for pixels that are not counted.
        num_classes: K.

    Returns:
        int64 (K, K), at [t, p] the number of pixels of class t that were predicted as p.
    """
    counted = mask != IGNORED
    pairs = mask[counted].long() * num_classes + prediction[counted]
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


class PixelCounts:
    """Pixel counts of a test set.

    Args:
        num_classes: K.

    Attributes:
        confusion: int64 (K, K), the confusion matrix of all images.
        areas: the `areas` (3, K) of each image, by its position in the split.
        distances: the distances (K,) of the predicted from the true class in each image, by its position; empty unless
            medical figures are computed.
    """

    def __init__(self, num_classes: int):
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self.areas: dict[int, np.ndarray] = {}
        self.distances: dict[int, np.ndarray] = {}

    def add(self, index: int, confusion: np.ndarray, distances: np.ndarray | None = None) -> None:
        """Add the confusion matrix (K, K), and possibly the distances (K,), of the image at a position."""
        self.confusion += confusion
        self.areas[index] = areas(confusion)
        if distances is not None:
            self.distances[index] = distances

    def merge(self, other: PixelCounts) -> None:
        """Add the images that another process has counted."""
        self.confusion += other.confusion
        self.areas |= other.areas
        self.distances |= other.distances


def areas(confusion: np.ndarray) -> np.ndarray:
    """Return (3, K): the numbers of correct, predicted and true pixels of each class."""
    return np.stack([confusion.diagonal(), confusion.sum(0), confusion.sum(1)])


def class_iou(areas: np.ndarray) -> np.ndarray:
    """Return the intersection over union of each class, (K,); NaN for a class that is neither true nor predicted."""
    correct, predicted, true = areas
    return divide(correct, predicted + true - correct)


def class_accuracy(areas: np.ndarray) -> np.ndarray:
    """Return the share of each class's pixels that is correct, (K,); NaN for a class without pixels."""
    correct, _, true = areas
    return divide(correct, true)


def figures(areas: np.ndarray) -> dict[str, float]:
    """Compute the figures from the areas (3, K) of a test set.

    Returns: `miou` (the mean over the classes that are true or predicted somewhere), `pixel_accuracy` and
        `mean_accuracy` (the mean over the classes that have pixels), which are mmsegmentation's mIoU, aAcc and mAcc.

    Raises:
        ValueError: if all pixels are ignored.
    """
    if not areas[2].sum():
        raise ValueError(f"there is nothing to evaluate: all pixels of the masks are {IGNORED}, which is ignored")
    return dict(zip(FIGURES, rates(areas).tolist(), strict=True))


def summarize(
    counts: PixelCounts, class_names: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Compute the figures of a test set, ready for JSON; rates are fractions of 1.

    Args:
        counts: pixel counts of all images.
        class_names: name of each class, by label.
        resamples: number of resamples of the bootstrap.
        seed: seed of the bootstrap.

    Returns: The `figures`, each with its interval `<name>_ci95` [low, high] by a bootstrap over the images, which is
        None for a single image; `n`, the number of images; `ci_methods`; and `per_class`: {name: {iou, accuracy,
        pixels}}, where a rate is None if the class has no pixels.

    Raises:
        ValueError: if all pixels are ignored.
    """
    images = np.stack([counts.areas[index] for index in sorted(counts.areas)])  # (N, 3, K)
    total = images.sum(0)
    limits = bootstrap(images, rates, resamples, seed)
    intervals = {
        f"{name}_ci95": pair.tolist() if len(images) > 1 else None for name, pair in zip(FIGURES, limits, strict=True)
    }
    return {
        "n": len(images),
        **figures(total),
        **intervals,
        "ci_methods": dict.fromkeys(FIGURES, f"percentile bootstrap over images, {resamples} resamples, seed {seed}"),
        "per_class": {
            name: {"iou": json_number(iou), "accuracy": json_number(accuracy), "pixels": int(pixels)}
            for name, iou, accuracy, pixels in zip(
                class_names, class_iou(total), class_accuracy(total), total[2], strict=True
            )
        },
    }


def write_iou_csv(path: str | Path, counts: PixelCounts, class_names: Sequence[str]) -> None:
    """Write a CSV table: class, iou, accuracy (both empty if undefined), true_pixels, predicted_pixels."""
    total = areas(counts.confusion)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "iou", "accuracy", "true_pixels", "predicted_pixels"])
        rows = zip(class_names, class_iou(total), class_accuracy(total), total[2], total[1], strict=True)
        for name, *rates, true, predicted in rows:
            writer.writerow([name, *("" if math.isnan(rate) else f"{rate:.6g}" for rate in rates), true, predicted])


def bootstrap(images: np.ndarray, figures: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int) -> np.ndarray:
    """Return the 95 % intervals of figures by a bootstrap over images, (F, 2); NaN for a single image.

    Args:
        images: (N, ...), what the images add to a sum. A resample draws images with replacement.
        figures: function from such a sum to the figures (F,), of which an undefined one is NaN.
        resamples: number of resamples.
        seed: seed of the resamples.
    """
    # float64 represents whole numbers up to 2^53 exactly.
    n, flat = len(images), images.reshape(len(images), -1).astype(np.float64)
    resampled = [
        figures((draws @ flat).reshape(images.shape[1:])) for draws in draw_images(n, resamples if n > 1 else 0, seed)
    ]
    return percentile_intervals(figures(images.sum(0)), np.array(resampled))


def rates(areas: np.ndarray) -> np.ndarray:
    """Return the values of `FIGURES`, NaN if there are no pixels."""
    if not areas[2].sum():
        return np.full(len(FIGURES), np.nan)
    correct, _, true = areas
    return np.array([np.nanmean(class_iou(areas)), correct.sum() / true.sum(), np.nanmean(class_accuracy(areas))])


def divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, NaN for a whole of 0."""
    return np.divide(part, whole, where=whole > 0, out=np.full(whole.shape, np.nan))


def json_number(value: float) -> float | None:
    """Return the value, or None for NaN, which JSON lacks."""
    return None if math.isnan(value) else float(value)
