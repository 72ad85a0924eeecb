"""Evaluation of manipulation localisation: F1 and area under the ROC curve of the manipulated pixels of an image.

A mask has two classes: 0, authentic, and 1, manipulated. Both figures are means over images, as in papers on
manipulation localisation such as IML-ViT (arXiv:2307.14863).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from retinue.evaluation.segmentation import divide
from retinue.utils.masks import IGNORED


def pixel_f1(areas: np.ndarray) -> np.ndarray:
    """Return the F1 of the manipulated pixels of each image, NaN for an image without manipulated pixels.

    Args:
        areas: (N, 3, 2), the numbers of correct, predicted and true pixels of each image and class, as
            `retinue.evaluation.segmentation.areas` returns them.

    Returns:
        float (N,).
    """
    correct, predicted, true = areas[:, :, 1].astype(float).T
    return np.divide(2 * correct, predicted + true, where=true > 0, out=np.full(len(areas), np.nan))


def pixel_auc(scores: np.ndarray, mask: np.ndarray) -> float:
    """Return the area under the ROC curve of an image's pixels, NaN without pixels of both classes.

    The area is the probability that a manipulated pixel has a higher score than an authentic one, where equal scores
    count half.

    Args:
        scores: Any increasing function of the probability that a pixel is manipulated, (H, W).
        mask: True classes (H, W); pixels of 255 are not counted.
    """
    counted = mask != IGNORED
    true = mask[counted] == 1
    if true.all() or not true.any():
        return np.nan
    # Imported here, since runs without two classes do not need this large library.
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(true, scores[counted]))


def summarize(areas: np.ndarray, aucs: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Compute the figures of a test set, ready for JSON.

    Images without manipulated pixels have no F1, and images without pixels of both classes no area under the curve.
    Such images do not count for the figure, and a figure without any image is left out.

    Args:
        areas: As `pixel_f1` takes them.
        aucs: Area under the curve of each image, (N,).
        resamples: Number of resamples of the bootstrap.
        seed: Seed of the bootstrap.

    Returns: `pixel_f1` and `pixel_auc`, each with its interval `<name>_ci95` [low, high] by a bootstrap over the images
        that count, which is None for a single image; and `ci_methods`.
    """
    rng, result, methods = np.random.default_rng(seed), {}, {}
    for name, values in (("pixel_f1", pixel_f1(areas)), ("pixel_auc", aucs)):
        values = values[~np.isnan(values)]
        if not len(values):
            continue
        means = [rng.choice(values, len(values)).mean() for _ in range(resamples)]
        result[name] = float(values.mean())
        result[f"{name}_ci95"] = np.percentile(means, [2.5, 97.5]).tolist() if len(values) > 1 else None
        methods[name] = f"percentile bootstrap over images, {resamples} resamples, seed {seed}"
    return result | {"ci_methods": methods}


def figures_of(arrays: Mapping[str, np.ndarray]) -> Callable[[np.ndarray], dict[str, float]]:
    """Return the function from how often each image counts, (N,), to the figures, for `Contributions`.

    A figure is NaN if no image that counts has it.
    """
    values = np.stack([pixel_f1(arrays["areas"]), arrays["pixel_auc"]], 1)
    defined = np.isfinite(values)
    filled = np.where(defined, values, 0.0)

    def figures(draws: np.ndarray) -> dict[str, float]:
        pixel_f1, pixel_auc = divide(draws @ filled, draws @ defined).tolist()
        return {"pixel_f1": pixel_f1, "pixel_auc": pixel_auc}

    return figures
