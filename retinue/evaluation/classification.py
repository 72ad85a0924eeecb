"""Evaluation of classification: accuracy, loss and calibration, each with a confidence interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from retinue.evaluation.statistics import draw_images, percentile_intervals

if TYPE_CHECKING:
    from torch import Tensor

# Number of confidence bins of the calibration error.
CALIBRATION_BINS = 15
# The 97.5 % quantile of the standard normal distribution.
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Predictions:
    """Most probable classes of N images, and the loss on each image.

    Attributes:
        index: int (N,), position of each image in its split; -1 marks padding of an incomplete batch.
        label: int (N,), true class of each image.
        topk: int (N, k), the k most probable classes, in descending order of their probability.
        scores: float (N, k), probabilities of `topk`.
        loss: float (N,), cross-entropy of each image.
        brier: float (N,), Brier score of each image (`topk_predictions`), 0 to 2.
    """

    index: np.ndarray
    label: np.ndarray
    topk: np.ndarray
    scores: np.ndarray
    loss: np.ndarray
    brier: np.ndarray

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.index)

    @property
    def correct(self) -> np.ndarray:
        """Array (N,) of bool, True if the most probable class is the label."""
        return self.topk[:, 0] == self.label

    @property
    def confidence(self) -> np.ndarray:
        """Array (N,) of float, the probability of the most probable class."""
        return self.scores[:, 0]

    @staticmethod
    def concatenate(parts: Sequence[Predictions]) -> Predictions:
        """Join predictions: sorted by index, each image once, without padding."""
        index = np.concatenate([part.index for part in parts])
        _, first = np.unique(index, return_index=True)
        order = first[index[first] >= 0]
        columns = (np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Predictions))
        return Predictions(*(column[order] for column in columns))


def topk_predictions(
    logits: Tensor, label: Tensor, index: Tensor, subset: Sequence[int] | None = None, k: int = 5
) -> Predictions:
    """Return the predictions for one batch.

    The Brier score of an image is the sum over the classes of (probability - truth)^2, where the truth is 1 for the
    label and 0 for the other classes (Brier 1950, Verification of Forecasts Expressed in Terms of Probability).

    Args:
        logits: (B, K), of any float type.
        label: (B,), 0 to K - 1.
        index: (B,), position of each image in its split; -1 marks padding.
        subset: classes to choose from. The softmax runs over these classes alone, and images of other classes are left
            out. The classes keep the numbers that they have in `logits`. None means all classes.
        k: number of classes to keep for each image; with fewer classes, all of them are kept.

    Raises:
        ValueError: if `subset` is empty, has a class twice, or has a class that `logits` lacks.
    """
    num_classes = logits.shape[1]
    classes = np.arange(num_classes) if subset is None else np.asarray(subset, dtype=np.int64)
    distinct = len(np.unique(classes)) == len(classes) > 0
    if not (distinct and classes.min() >= 0 and classes.max() < num_classes):
        raise ValueError(f"a subset must hold different classes of 0..{num_classes - 1}, not {list(classes)}")
    position = np.full(num_classes, -1)
    position[classes] = np.arange(len(classes))

    labels = label.cpu().numpy()
    rows = np.flatnonzero(position[labels] >= 0)
    log_probs = logits.detach()[rows][:, classes].float().log_softmax(1)
    top_log_probs, top = log_probs.topk(min(k, len(classes)))
    rows_of_labels = np.arange(len(rows)), position[labels[rows]]
    probs = log_probs.exp().cpu().numpy()
    return Predictions(
        index=index.cpu().numpy()[rows],
        label=labels[rows],
        topk=classes[top.cpu().numpy()],
        scores=top_log_probs.exp().cpu().numpy(),
        loss=-log_probs.cpu().numpy()[rows_of_labels],
        brier=(probs**2).sum(1) - 2 * probs[rows_of_labels] + 1,
    )


def summarize(
    predictions: Predictions, class_names: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Compute the figures of a test set, ready for JSON; rates are fractions of 1.

    Args:
        predictions: predictions for all images, without padding.
        class_names: names of the classes, by label.
        resamples: number of resamples of the bootstrap.
        seed: seed of the bootstrap.

    Returns: `top1`, `top5`, `loss`, `brier` (mean Brier score), `ece` (expected calibration error), `adaptive_ece`,
        `aurc` (area under the risk-coverage curve) and `mean_class_accuracy` (over the classes that
        have images), each with its interval `<name>_ci95` [low, high]; `n`, the number of images; `ci_methods`; and
        `per_class`: {name: {n, accuracy, ci95}}. A rate is None for a class without images. A bootstrap interval is
        None for a single image. If several classes have the same name, their labels follow the name.

    Raises:
        ValueError: if there is no image, a label has no name, or a loss or score is not finite.
    """
    n, num_classes = len(predictions), len(class_names)
    label, correct = predictions.label, predictions.correct
    if not n:
        raise ValueError("there are no predictions to evaluate")
    if label.max() >= num_classes:
        raise ValueError(f"label {label.max()} has no name: there are {num_classes} classes")
    check_finite(predictions)
    counts = np.bincount(label, minlength=num_classes)
    present = counts > 0
    accuracy = np.divide(np.bincount(label, correct, num_classes), counts, where=present, out=np.zeros(num_classes))
    intervals = wilson(accuracy, np.maximum(counts, 1))
    top1 = correct.mean()
    top5 = (predictions.topk[:, :5] == label[:, None]).any(1).mean()
    mean = accuracy[present].mean()
    # The effective number of images is Kish's, which supposes equal accuracies of all classes, or the number that
    # follows from the variances of the classes if that is smaller.
    effective = present.sum() ** 2 / (1 / counts[present]).sum()
    if variance := (accuracy * (1 - accuracy))[present] @ (1 / counts[present]) / present.sum() ** 2:
        effective = min(effective, mean * (1 - mean) / variance)
    loss_interval, ece_interval = _bootstrap(predictions, resamples, seed) if n > 1 else (None, None)
    brier_interval, aurc_interval = selective_intervals(predictions, resamples, seed) if n > 1 else (None, None)

    repeated = {name for name, count in Counter(class_names).items() if count > 1}
    keys = [f"{name} ({label})" if name in repeated else name for label, name in enumerate(class_names)]
    bootstrap = f"{resamples} resamples, seed {seed}"
    return {
        "n": n,
        "top1": float(top1),
        "top1_ci95": wilson(top1, n).tolist(),
        "top5": float(top5),
        "top5_ci95": wilson(top5, n).tolist(),
        "loss": float(predictions.loss.mean(dtype=np.float64)),
        "loss_ci95": loss_interval,
        "ece": float(np.abs(calibration_gaps(predictions)).sum()),
        "ece_ci95": ece_interval,
        "adaptive_ece": adaptive_error(predictions.confidence, correct),
        "brier": float(predictions.brier.mean(dtype=np.float64)),
        "brier_ci95": brier_interval,
        "aurc": float(risk_coverage(predictions.confidence, correct).mean()),
        "aurc_ci95": aurc_interval,
        "mean_class_accuracy": float(mean),
        "mean_class_accuracy_ci95": wilson(mean, effective).tolist(),
        "ci_methods": {
            "top1": "Wilson score",
            "top5": "Wilson score",
            "loss": f"percentile bootstrap, {bootstrap}",
            "ece": f"bootstrap test inversion, {bootstrap}",
            "brier": f"percentile bootstrap, {bootstrap}",
            "aurc": f"percentile bootstrap, {bootstrap}",
            "mean_class_accuracy": "Wilson score, effective number of images",
            "per_class": "Wilson score",
        },
        "per_class": {
            key: {
                "n": int(count),
                "accuracy": float(rate) if count else None,
                "ci95": interval.tolist() if count else None,
            }
            for key, count, rate, interval in zip(keys, counts, accuracy, intervals, strict=True)
        },
    }


def check_finite(predictions: Predictions) -> None:
    """Check the scores and losses of all images.

    Raises:
        ValueError: if one is NaN or infinite.
    """
    finite, n = np.isfinite(predictions.loss) & np.isfinite(predictions.scores).all(1), len(predictions)
    if not finite.all():
        first = predictions.index[~finite][0]
        raise ValueError(f"the scores of {n - finite.sum()} of {n} images are not finite; the first is image {first}")


def wilson(rate: np.ndarray | float, n: np.ndarray | float) -> np.ndarray:
    """Return the 95 % score interval (Wilson 1927) of a proportion.

    Args:
        rate: (...), the observed proportion, 0 to 1.
        n: (...), the number of trials, above 0.

    Returns:
        (..., 2), the lower and the upper limit.
    """
    rate, n = np.asarray(rate), np.asarray(n)
    centre = (rate + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * np.sqrt(rate * (1 - rate) / n + Z95**2 / (4 * n**2))
    return np.clip(np.stack([centre - half, centre + half], -1), 0, 1)


def calibration_bins(confidence: np.ndarray) -> np.ndarray:
    """Return the bin of each confidence; bin b of B bins holds the confidences in (b / B, (b + 1) / B]."""
    return np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)


def calibration_gaps(predictions: Predictions) -> np.ndarray:
    """Return (accuracy - mean confidence) of each of B bins, times the bin's share of the images: (B,).

    The sum of the absolute values is the expected calibration error (Guo et al. 2017, On Calibration of Modern Neural
    Networks).
    """
    gap = predictions.correct - predictions.confidence.astype(np.float64)
    return np.bincount(calibration_bins(predictions.confidence), gap, CALIBRATION_BINS) / len(predictions)


def adaptive_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Return the calibration error over bins that hold equally many images (Nguyen and O'Connor 2015).

    Confidences pile up near 1, where bins of equal width hold most images; bins of equal numbers adapt to that.

    Args:
        confidence: (N,), probability of the most probable class.
        correct: bool (N,), whether that class is the label.
    """
    gaps = (correct - confidence.astype(np.float64))[np.argsort(confidence, kind="stable")]
    parts = np.array_split(gaps, min(CALIBRATION_BINS, len(gaps)))
    return float(sum(abs(part.sum()) for part in parts) / len(gaps))


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Return the risk-coverage curve (Geifman et al., ICLR 2019, arXiv:1805.08206).

    A net that answers only the n images of which it is most confident has a risk, its share of wrong answers. Images of
    equal confidence count as wrong by their common share. The mean of the curve is the area under it.

    Args:
        confidence: (N,), probability of the most probable class.
        correct: bool (N,), whether that class is the label.

    Returns:
        (N,), the risk for n = 1, ..., N.
    """
    _, level, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    wrong = (np.bincount(level, ~correct) / counts).repeat(counts)
    return wrong.cumsum() / np.arange(1, len(wrong) + 1)


def selective_intervals(predictions: Predictions, resamples: int, seed: int) -> tuple[list[float], list[float]]:
    """Return the 95 % intervals of the mean Brier score and of the area under the risk-coverage curve."""
    n, confidence, correct = len(predictions), predictions.confidence, predictions.correct
    _, level = np.unique(-confidence, return_inverse=True)
    ranks = np.arange(1, n + 1)
    resampled = np.empty((resamples, 2))
    for i, draws in enumerate(draw_images(n, resamples, seed)):
        counts = np.bincount(level, draws)
        share = np.bincount(level, draws * ~correct) / np.maximum(counts, 1)
        wrong = share.repeat(counts.astype(int))
        resampled[i] = draws @ predictions.brier / n, (wrong.cumsum() / ranks).mean()
    observed = np.array([predictions.brier.mean(), risk_coverage(confidence, correct).mean()])
    brier, aurc = percentile_intervals(observed, resampled).tolist()
    return brier, aurc


def _bootstrap(predictions: Predictions, resamples: int, seed: int) -> tuple[list[float], list[float]]:
    """Return the 95 % intervals of the mean loss and of the expected calibration error."""
    n = len(predictions)
    bins = calibration_bins(predictions.confidence)
    order = np.argsort(bins, kind="stable")
    # First entry of each bin that is not empty.
    starts = np.flatnonzero(np.diff(bins[order], prepend=-1))
    gap = (predictions.correct - predictions.confidence.astype(np.float64))[order] / n
    loss = predictions.loss.astype(np.float64)[order] / n
    losses, gaps = np.empty(resamples), np.empty((resamples, len(starts)))
    for i, draws in enumerate(draw_images(n, resamples, seed)):
        losses[i] = draws @ loss
        gaps[i] = np.add.reduceat(draws * gap, starts)

    # Sampling noise increases the absolute values of the gaps. So the error of a resample is above the estimate, just
    # as the estimate is above the true error, and the percentile interval of a calibrated net never contains its true
    # error. The test is inverted instead (Carpenter 1999, Test inversion bootstrap confidence intervals): suppose that
    # the true gaps are the observed gaps times a scale from 0 to 3, and keep the scales for which the observed error is
    # within the central 95 % of the resampled errors.
    observed = np.add.reduceat(gap, starts)
    error, noise = np.abs(observed).sum(), gaps - observed
    scales = np.linspace(0, 3, 301)
    limits = np.array([np.percentile(np.abs(scale * observed + noise).sum(1), [2.5, 97.5]) for scale in scales])
    plausible = scales[(limits[:, 0] <= error) & (error <= limits[:, 1])]
    ece_interval = [plausible.min(initial=1) * error, plausible.max(initial=1) * error]
    return np.percentile(losses, [2.5, 97.5]).tolist(), np.clip(ece_interval, 0, 1).tolist()
