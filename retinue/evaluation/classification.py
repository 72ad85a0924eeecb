"""What a classifier's predictions are worth: accuracy, loss and calibration, each with a confidence interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

CALIBRATION_BINS = 15
Z95 = 1.959963984540054  # the standard normal's 97.5 % point


@dataclass(frozen=True)
class Predictions:
    """The likeliest classes of N images, and the loss on each.

    `scores` are the probabilities of `topk`, descending. An image's `index` is its place in the data set; -1 marks
    padding of an uneven batch.
    """

    index: np.ndarray  # (N,) int
    label: np.ndarray  # (N,) int
    topk: np.ndarray  # (N, k) int
    scores: np.ndarray  # (N, k) float
    loss: np.ndarray  # (N,) float

    def __len__(self) -> int:
        return len(self.index)

    @property
    def correct(self) -> np.ndarray:
        """(N,) bool: is the likeliest class the label?"""
        return self.topk[:, 0] == self.label

    @property
    def confidence(self) -> np.ndarray:
        """(N,) float: the probability of the likeliest class."""
        return self.scores[:, 0]

    @staticmethod
    def concatenate(parts: Sequence[Predictions]) -> Predictions:
        """Those of all parts, by index, each image once, padding left out."""
        index = np.concatenate([part.index for part in parts])
        _, first = np.unique(index, return_index=True)
        order = first[index[first] >= 0]
        return Predictions(*(np.concatenate([getattr(p, f.name) for p in parts])[order] for f in fields(Predictions)))


def topk_predictions(
    logits: Tensor, label: Tensor, index: Tensor, subset: Sequence[int] | None = None, k: int = 5
) -> Predictions:
    """The predictions of one batch.

    Args:
        logits: (B, K), of any float type.
        label: (B,), in 0..K-1.
        index: (B,).
        subset: the only classes to choose from; the softmax runs over them alone, and images of other classes are left
            out. `topk` and `label` still number the classes as `logits` does.
        k: as many as there are classes, where those are fewer.

    Raises:
        ValueError: `subset` is empty, names a class twice or one that `logits` does not have.
    """
    num_classes = logits.shape[1]
    classes = np.arange(num_classes) if subset is None else np.asarray(subset, dtype=np.int64)
    if (
        not len(classes)
        or len(np.unique(classes)) < len(classes)
        or not 0 <= classes.min() <= classes.max() < num_classes
    ):
        raise ValueError(f"a subset must hold different classes of 0..{num_classes - 1}, not {list(classes)}")
    position = np.full(num_classes, -1)
    position[classes] = np.arange(len(classes))

    labels = label.cpu().numpy()
    rows = np.flatnonzero(position[labels] >= 0)
    log_probs = logits.detach()[rows][:, classes].float().log_softmax(1)
    top_log_probs, top = log_probs.topk(min(k, len(classes)))
    return Predictions(
        index=index.cpu().numpy()[rows],
        label=labels[rows],
        topk=classes[top.cpu().numpy()],
        scores=top_log_probs.exp().cpu().numpy(),
        loss=-log_probs.cpu().numpy()[np.arange(len(rows)), position[labels[rows]]],
    )


def summarize(
    predictions: Predictions, class_names: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """What to report of a test set, ready for JSON; rates are fractions of 1.

    `top1`, `top5` (of all classes, where they are fewer), `loss`, `ece`, `mean_class_accuracy` (over the classes that
    have images), each with `<name>_ci95` [low, high]; `n` images; `ci_methods`; `per_class`: {name: {n, accuracy,
    ci95}}, None for a class without images. A bootstrap tells nothing of one image: None again. Where two classes
    have one name, their numbers stand behind it.

    Raises:
        ValueError: there is no image, a label has no name, or a loss or score is not finite.
    """
    n, num_classes = len(predictions), len(class_names)
    label, correct = predictions.label, predictions.correct
    if not n:
        raise ValueError("there are no predictions to summarize")
    if label.max() >= num_classes:
        raise ValueError(f"label {label.max()} has no name: there are {num_classes} classes")
    finite = np.isfinite(predictions.loss) & np.isfinite(predictions.scores).all(1)
    if not finite.all():
        first = predictions.index[~finite][0]
        raise ValueError(f"the scores of {n - finite.sum()} of {n} images are not finite; the first is image {first}")

    counts = np.bincount(label, minlength=num_classes)
    present = counts > 0
    accuracy = np.divide(np.bincount(label, correct, num_classes), counts, where=present, out=np.zeros(num_classes))
    intervals = wilson(accuracy, np.maximum(counts, 1))
    top1 = correct.mean()
    top5 = (predictions.topk[:, :5] == label[:, None]).any(1).mean()
    mean = accuracy[present].mean()
    # The effective number of images: Kish's (all classes alike), or what the classes' own variances say, if fewer.
    effective = present.sum() ** 2 / (1 / counts[present]).sum()
    if variance := (accuracy * (1 - accuracy))[present] @ (1 / counts[present]) / present.sum() ** 2:
        effective = min(effective, mean * (1 - mean) / variance)
    loss_interval, ece_interval = _bootstrap(predictions, resamples, seed) if n > 1 else (None, None)

    repeated = {name for name, times in Counter(class_names).items() if times > 1}
    keys = [f"{name} ({i})" if name in repeated else name for i, name in enumerate(class_names)]
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
        "mean_class_accuracy": float(mean),
        "mean_class_accuracy_ci95": wilson(mean, effective).tolist(),
        "ci_methods": {
            "top1": "Wilson score",
            "top5": "Wilson score",
            "loss": f"percentile bootstrap, {bootstrap}",
            "ece": f"bootstrap test inversion, {bootstrap}",
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


def wilson(rate: np.ndarray | float, n: np.ndarray | float) -> np.ndarray:
    """(..., 2): the 95 % score interval (Wilson 1927) of a proportion `rate` seen in `n` > 0 trials."""
    rate, n = np.asarray(rate), np.asarray(n)
    centre = (rate + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * np.sqrt(rate * (1 - rate) / n + Z95**2 / (4 * n**2))
    return np.clip(np.stack([centre - half, centre + half], -1), 0, 1)


def calibration_bins(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence: bin b of B holds those in (b / B, (b + 1) / B]."""
    return np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)


def calibration_gaps(predictions: Predictions) -> np.ndarray:
    """(B,): accuracy less mean confidence in each bin, times the bin's share of the images.

    Their magnitudes sum up to the expected calibration error (Guo et al. 2017, On Calibration of Modern Neural
    Networks).
    """
    gap = predictions.correct - predictions.confidence.astype(np.float64)
    return np.bincount(calibration_bins(predictions.confidence), gap, CALIBRATION_BINS) / len(predictions)


def _bootstrap(predictions: Predictions, resamples: int, seed: int) -> tuple[list[float], list[float]]:
    """95 % intervals of the mean loss and of the expected calibration error."""
    n = len(predictions)
    bins = calibration_bins(predictions.confidence)
    order = np.argsort(bins, kind="stable")
    starts = np.flatnonzero(np.diff(bins[order], prepend=-1))  # of the bins that are not empty
    gap = (predictions.correct - predictions.confidence.astype(np.float64))[order] / n
    loss = predictions.loss.astype(np.float64)[order] / n
    losses, gaps = np.empty(resamples), np.empty((resamples, len(starts)))
    rng = np.random.default_rng(seed)
    for i in range(resamples):
        times = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)  # that each image is drawn
        losses[i] = times @ loss
        gaps[i] = np.add.reduceat(times * gap, starts)

    # Noise adds to the magnitudes of the gaps, so a resample's error lies above the estimate as that lies above the
    # truth, and the percentile interval of a calibrated net never holds its true error. Instead: of the gaps scaled by
    # 0 to 3, those under which the error that was seen is among the middle 95 % (Carpenter 1999, Test inversion
    # bootstrap confidence intervals).
    observed = np.add.reduceat(gap, starts)
    error, noise = np.abs(observed).sum(), gaps - observed
    scales = np.linspace(0, 3, 301)
    limits = np.array([np.percentile(np.abs(scale * observed + noise).sum(1), [2.5, 97.5]) for scale in scales])
    possible = scales[(limits[:, 0] <= error) & (error <= limits[:, 1])]
    ece_interval = [possible.min(initial=1) * error, possible.max(initial=1) * error]
    return np.percentile(losses, [2.5, 97.5]).tolist(), np.clip(ece_interval, 0, 1).tolist()
