"""Evaluation of panoptic segmentation: panoptic, segmentation and recognition quality, and results in COCO's format.

Paper: Panoptic Segmentation (Kirillov et al., CVPR 2019, arXiv:1801.00868), section 4, with the rules for void pixels
and crowds of the reference evaluator, repository cocodataset/panopticapi.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from retinue.evaluation.segmentation import bootstrap, divide, json_number
from retinue.utils.files import replacing

# Rows of `match`, and names of the figures.
COUNTS = ("iou", "tp", "fp", "fn")
FIGURES = ("pq", "sq", "rq")


class Segments(NamedTuple):
    """Segments of one image.

    Attributes:
        ids: int64 (H, W), id of the segment at each pixel; other values than those of `labels` are void.
        labels: label of each segment by its id.
        crowds: ids of the segments that are crowds.
    """

    ids: np.ndarray
    labels: Mapping[int, int]
    crowds: frozenset[int] = frozenset()


def match(prediction: Segments, truth: Segments, num_classes: int) -> np.ndarray:
    """Match the predicted with the true segments of an image, and count them by class.

    Two segments match if they have the same class and an intersection over union above 0.5; void pixels of the truth
    do not count. Crowds match nothing. A prediction that matches nothing is wrong, unless more than half of it is void
    or lies in crowds of its class.

    Args:
        prediction: predicted segments.
        truth: true segments.
        num_classes: K.

    Returns:
        float64 (4, K), the `COUNTS` of each class: sum of the intersections over unions of the matches, and numbers of
        matches, wrong predictions and missed segments.
    """
    counts = np.zeros((len(COUNTS), num_classes))
    true_ids, rows = np.unique(truth.ids, return_inverse=True)
    predicted_ids, columns = np.unique(prediction.ids, return_inverse=True)
    pairs = np.bincount(
        rows.ravel() * len(predicted_ids) + columns.ravel(), minlength=len(true_ids) * len(predicted_ids)
    )
    overlaps = pairs.reshape(len(true_ids), len(predicted_ids))
    true_areas, predicted_areas = overlaps.sum(1), overlaps.sum(0)
    true_labels = np.array([truth.labels.get(int(id), -1) for id in true_ids])
    predicted_labels = np.array([prediction.labels.get(int(id), -1) for id in predicted_ids])
    is_crowd = np.isin(true_ids, list(truth.crowds))
    void = overlaps[true_labels < 0].sum(0)

    iou = overlaps / (true_areas[:, None] + predicted_areas - overlaps - void).clip(min=1)
    same_class = (true_labels[:, None] == predicted_labels) & (true_labels[:, None] >= 0)
    matches = same_class & ~is_crowd[:, None] & (iou > 0.5)
    in_crowds = (overlaps * (same_class & is_crowd[:, None])).sum(0)
    wrong = (predicted_labels >= 0) & ~matches.any(0) & (void + in_crowds <= 0.5 * predicted_areas)
    missed = (true_labels >= 0) & ~is_crowd & ~matches.any(1)
    i, j = matches.nonzero()
    np.add.at(counts[0], true_labels[i], iou[i, j])
    for row, labels in zip(counts[1:], (true_labels[i], predicted_labels[wrong], true_labels[missed]), strict=True):
        np.add.at(row, labels, 1)
    return counts


def class_quality(counts: np.ndarray) -> np.ndarray:
    """Return the `FIGURES` of each class, (3, K), from the counts (4, K); NaN for a class without any segment.

    Segmentation quality is the mean IoU of the matches, 0 without matches; recognition quality is the F1 score.
    """
    iou, tp, fp, fn = counts
    segments = tp + 0.5 * (fp + fn)
    sq = np.where(segments > 0, iou / tp.clip(min=1), np.nan)
    return np.stack([divide(iou, segments), sq, divide(tp, segments)])


def _means(counts: np.ndarray, num_things: int) -> np.ndarray:
    """Return the figures of all classes, of things and of stuff, (3 * 3,): means over the classes with segments."""
    per_class = class_quality(counts)
    parts = (per_class, per_class[:, :num_things], per_class[:, num_things:])
    return np.concatenate([divide(np.nansum(part, 1), np.isfinite(part).sum(1)) for part in parts])


def figures(counts: np.ndarray, num_things: int) -> dict[str, float]:
    """Return `pq`, `sq`, `rq`, `pq_things`, ..., `rq_stuff` from the counts (4, K) of a set; NaN without segments."""
    names = [f"{name}{part}" for part in ("", "_things", "_stuff") for name in FIGURES]
    return dict(zip(names, _means(counts, num_things).tolist(), strict=True))


def summarize(
    counts: Mapping[int, np.ndarray],
    class_names: Sequence[str],
    num_things: int,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute the figures of a test set, ready for JSON; rates are fractions of 1.

    Args:
        counts: counts (4, K) of each image by its position.
        class_names: name of each class, by label; the things come first.
        num_things: number of things.
        resamples: number of resamples of the bootstrap.
        seed: seed of the bootstrap.

    Returns:
        The number `n` of images, the `figures` with their intervals `<name>_ci95` by a bootstrap over the images, and
        `per_class`: {name: {pq, sq, rq, n}}, where n is the number of true segments. A figure is None if no segment has
        its classes, and an interval for a single image.
    """
    images = np.stack([counts[index] for index in sorted(counts)])
    total = images.sum(0)
    intervals = bootstrap(images, lambda sums: _means(sums, num_things), resamples, seed)
    summary: dict[str, Any] = {"n": len(images)}
    for (name, value), pair in zip(figures(total, num_things).items(), intervals, strict=True):
        summary |= {name: json_number(value), f"{name}_ci95": None if np.isnan(pair).any() else pair.tolist()}
    method = f"percentile bootstrap over images, {resamples} resamples, seed {seed}"
    rows = zip(class_names, class_quality(total).T, total.T, strict=True)
    return summary | {
        "ci_methods": dict.fromkeys(figures(total, num_things), method),
        "per_class": {
            name: dict(zip(FIGURES, map(json_number, quality), strict=True)) | {"n": int(tp + fn)}
            for name, quality, (_, tp, _, fn) in rows
        },
    }


def write_pq_csv(path: str | Path, counts: Mapping[int, np.ndarray], class_names: Sequence[str]) -> None:
    """Write a CSV table: class, pq, sq, rq (empty if undefined), matched, wrong, missed."""
    total = np.sum(list(counts.values()), axis=0)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", *FIGURES, "matched", "wrong", "missed"])
        for name, quality, numbers in zip(class_names, class_quality(total).T, total[1:].T, strict=True):
            writer.writerow([name, *("" if np.isnan(q) else f"{q:.6g}" for q in quality), *numbers.astype(int)])


def write_segments(path: str | Path, segments: Segments, category_ids: Sequence[int]) -> list[dict[str, int]]:
    """Write the PNG of an image in COCO's panoptic format, and return its `segments_info`.

    Args:
        path: file to write.
        segments: segments with the ids 1, 2, ...
        category_ids: id of each class, by label.
    """
    ids = np.where(np.isin(segments.ids, list(segments.labels)), segments.ids, 0)
    with replacing(path) as temporary:
        Image.fromarray((ids[..., None] >> np.array([0, 8, 16]) & 255).astype(np.uint8)).save(temporary, "PNG")
    return [{"id": id, "category_id": category_ids[label]} for id, label in segments.labels.items()]
