"""Figures of medical segmentation: Dice, HD95, IoU, sensitivity and specificity of each class, as means over images.

Definitions: Metrics reloaded (Maier-Hein et al., Nature Methods 2024, arXiv:2206.01653). Ignored pixels belong to no
class, in the truth and in the prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.ndimage import binary_erosion

from retinue.evaluation.segmentation import PixelCounts, bootstrap, divide, json_number
from retinue.utils.masks import IGNORED, distances_from

# Names of the figures: those of `image_rates`, then the distance.
RATES = ("dice", "image_iou", "sensitivity", "specificity")
FIGURES = (*RATES, "hd95")


def image_rates(areas: np.ndarray) -> np.ndarray:
    """Compute the `RATES` of one image for each class.

    Args:
        areas: (3, K), numbers of correct, predicted and true pixels.

    Returns:
        float64 (4, K). Dice and IoU are NaN for a class that is neither true nor predicted, sensitivity for a class
        without true pixels, and specificity for a class that all pixels have.
    """
    correct, predicted, true = areas
    others = true.sum() - true
    return np.stack(
        [
            divide(2 * correct, predicted + true),
            divide(correct, predicted + true - correct),
            divide(correct, true),
            divide(others - predicted + correct, others),
        ]
    )


def image_distances(
    prediction: np.ndarray, mask: np.ndarray, num_classes: int, spacing: Sequence[float] | None = None
) -> np.ndarray:
    """Compute the HD95 of one image for each class.

    Args:
        prediction: (H, W), labels 0 to K - 1.
        mask: (H, W), true labels, or 255 for pixels that are not counted.
        num_classes: K.
        spacing: Distances between neighbouring pixels (vertical, horizontal). None measures in pixels.

    Returns:
        float64 (K,). A class that is only true or only predicted has the diagonal of the image, a class that is neither
        has NaN.
    """
    spacing = (1.0, 1.0) if spacing is None else spacing
    prediction = np.where(mask == IGNORED, IGNORED, prediction)
    distances = np.full(num_classes, np.nan)
    predicted, true = set(np.unique(prediction)) - {IGNORED}, set(np.unique(mask)) - {IGNORED}
    for label in predicted | true:
        both = label in predicted and label in true
        diagonal = math.hypot(*(side * step for side, step in zip(mask.shape, spacing, strict=True)))
        distances[label] = hd95(prediction == label, mask == label, spacing) if both else diagonal
    return distances


def hd95(first: np.ndarray, second: np.ndarray, spacing: Sequence[float] = (1.0, 1.0)) -> float:
    """Compute the 95th percentile of the Hausdorff distance between the borders of two regions.

    A pixel of a region belongs to the border if one of its four neighbours is outside the region or the image. Each
    border has the 95th percentile of the distances of its pixels from the nearest pixel of the other border, and HD95
    is the larger of the two.

    Args:
        first: bool (H, W), a region with at least one pixel.
        second: The same for the other region.
        spacing: Distances between neighbouring pixels (vertical, horizontal).
    """
    either = first | second
    # Outside the box around both regions there is no border, so it need not be searched.
    box = tuple(slice(indices[0], indices[-1] + 1) for indices in map(np.flatnonzero, (either.any(1), either.any(0))))
    borders = [region[box] & np.logical_not(binary_erosion(region[box])) for region in (first, second)]
    pairs = zip(borders, reversed(borders), strict=True)
    return max(float(np.percentile(distances_from(other, spacing)[border], 95)) for border, other in pairs)


def with_counts(values: np.ndarray) -> np.ndarray:
    """Return (2, ...): the values with 0 for NaN, and 1 where a value is defined; their sums give means."""
    defined = np.isfinite(values)
    return np.stack([np.where(defined, values, 0.0), defined])


def mean_figures(sums: np.ndarray, background: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the means over the classes (F,) and the figures of each class (F, K) from sums over images.

    Args:
        sums: (2, F, K), sums of `with_counts` over images.
        background: Label that the means over the classes leave out.
    """
    per_class = divide(*sums)
    classes = per_class if background is None else np.delete(per_class, background, axis=1)
    return divide(*with_counts(classes).sum(-1)), per_class


def add_medical_figures(
    summary: dict[str, Any],
    counts: PixelCounts,
    class_names: Sequence[str],
    background: int | None,
    unit: str,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> None:
    """Add the `FIGURES` to the summary of a test set (`retinue.evaluation.segmentation.summarize`), in place.

    A figure of a class is the mean over the images in which it is defined, and the figure of the set is the mean over
    the classes. Each has an interval `<name>_ci95` by a bootstrap over the images.

    Args:
        summary: The summary; figures that no image defines are None.
        counts: Counts of all images, with their distances.
        class_names: Name of each class, by label.
        background: Label that the means over the classes leave out, if any.
        unit: Unit of HD95.
        resamples: Number of resamples of the bootstrap.
        seed: Seed of the bootstrap.
    """
    order = sorted(counts.areas)
    images = _image_sums([counts.areas[index] for index in order], [counts.distances[index] for index in order])

    def figures(sums: np.ndarray) -> np.ndarray:
        means, per_class = mean_figures(sums, background)
        return np.concatenate([means[:, None], per_class], axis=1).ravel()

    table = figures(images.sum(0)).reshape(len(FIGURES), -1)
    intervals = bootstrap(images, figures, resamples, seed).reshape(len(FIGURES), -1, 2)
    for name, row, limits in zip(FIGURES, table, intervals, strict=True):
        for entries, value, pair in zip(
            (summary, *(summary["per_class"][label] for label in class_names)), row, limits, strict=True
        ):
            entries[name] = json_number(value)
            entries[f"{name}_ci95"] = None if np.isnan(pair).any() else pair.tolist()
        summary["ci_methods"][name] = summary["ci_methods"]["miou"]
    summary["hd95_unit"] = unit


def figures_of(arrays: Mapping[str, np.ndarray]) -> Callable[[np.ndarray], dict[str, float]]:
    """Return the function from how often each image counts, (N,), to the `FIGURES`, for `Contributions`."""
    images, background = _image_sums(arrays["areas"], arrays["distances"]), int(arrays["background"])
    flat = images.reshape(len(images), -1)

    def figures(draws: np.ndarray) -> dict[str, float]:
        means, _ = mean_figures((draws @ flat).reshape(images.shape[1:]), None if background < 0 else background)
        return dict(zip(FIGURES, means.tolist(), strict=True))

    return figures


def _image_sums(areas: Sequence[np.ndarray] | np.ndarray, distances: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Return what each image adds to the sums of `mean_figures`, (N, 2, F, K), from areas (3, K) and distances (K,)."""
    values = [np.vstack([image_rates(area), distance]) for area, distance in zip(areas, distances, strict=True)]
    return np.stack([with_counts(value) for value in values])
