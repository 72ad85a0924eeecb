"""Figures of a robustness panel: its rows, the means of its groups, and the mean corruption error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retinue.evaluation.classification import wilson
from retinue.evaluation.statistics import draw_images, percentile_intervals

# AlexNet's mean error over the five severities of each corruption of ImageNet-C (Hendrycks and Dietterich,
# arXiv:1903.12261), in the digits that github.com/google-research/augmix (imagenet.py) takes from their repository.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
RESAMPLES = 1000


@dataclass(frozen=True)
class Row:
    """Accuracy on one changed test set.

    Attributes:
        group: what is changed, such as corruption or pgd; a group has one figure, the mean over its rows.
        name: the change, such as fog.
        level: its strength: severity, size in pixels, or epsilon of 255; None for a whole test set.
        index: (N,), positions of the images.
        correct: bool (N,), whether each image is right.
        clean: accuracy on unchanged images of the same classes.
    """

    group: str
    name: str
    level: Any
    index: np.ndarray
    correct: np.ndarray
    clean: float

    @property
    def top1(self) -> float:
        """Share of the images that are right."""
        return float(self.correct.mean())

    def describe(self) -> dict[str, Any]:
        """Return the row as `result.json` has it; `gap` is the clean accuracy minus that of the row."""
        return {
            "group": self.group,
            "name": self.name,
            "level": self.level,
            "n": len(self.correct),
            "top1": self.top1,
            "top1_ci95": wilson(self.top1, len(self.correct)).tolist(),
            "clean_top1": self.clean,
            "gap": self.clean - self.top1,
        }


def group_figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the mean accuracy `robust_<group>` of each group with its interval, and `mce` if there is ImageNet-C.

    The interval covers the choice of the images; a group whose rows have different images has none.
    """
    figures: dict[str, Any] = {}
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        figures[f"robust_{group}"] = float(np.mean([row.top1 for row in members]))
        if all(np.array_equal(row.index, members[0].index) for row in members):
            figures[f"robust_{group}_ci95"] = mean_interval(np.stack([row.correct for row in members]))
    errors: dict[str, list[float]] = {}
    for row in rows:
        if row.group == "imagenet_c":
            errors.setdefault(row.name, []).append(1 - row.top1)
    if set(errors) == set(ALEXNET_ERRORS):
        figures["mce"] = mean_corruption_error(errors)
    return figures


def mean_interval(correct: np.ndarray) -> list[float]:
    """Return the 95 % interval of a mean accuracy over sets of the same images.

    Args:
        correct: bool (S, N), whether each image is right in each set.

    Returns:
        The Wilson interval for one set; the percentile interval of a bootstrap over the images for several sets.
    """
    per_image = correct.mean(0)
    if len(correct) == 1:
        return wilson(per_image.mean(), len(per_image)).tolist()
    resampled = np.array([draws @ per_image / len(per_image) for draws in draw_images(len(per_image), RESAMPLES, 0)])
    return percentile_intervals(per_image.mean(keepdims=True), resampled[:, None])[0].tolist()


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> float:
    """Return the mCE: the mean over the corruptions of the error relative to AlexNet's; 1 is AlexNet's.

    Args:
        errors: error of each severity, 0 to 1, for each corruption of `ALEXNET_ERRORS`.
    """
    return float(np.mean([np.mean(errors[name]) / reference for name, reference in ALEXNET_ERRORS.items()]))
