"""Matches of detections with objects, from which average precision follows for any choice of the images.

The rules of accumulation are those of pycocotools (Microsoft COCO, arXiv:1405.0312; repository cocodataset/cocoapi).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from retinue.evaluation.statistics import draw_halves, half_sample_intervals

if TYPE_CHECKING:
    from pycocotools.cocoeval import COCOeval

# Names of the figures of `Matches.figures`.
FIGURES = ("ap", "ap50", "ap75")
# Number of thresholds of intersection over union, from 0.5 to 0.95.
NUM_THRESHOLDS = 10
# Number of half-samples for the intervals of a test; 1,000 of COCO's 5,000 images would take half a minute and more.
HALF_SAMPLES = 300
# Levels of recall at which precision is read, as in pycocotools.
RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Matches:
    """Detections of a test set, each right, wrong or ignored, and its objects; for objects of all sizes.

    Attributes:
        shape: numbers of images N, of classes K and of joined sets S, int (3,). The class of set s and label k is
            s * K + k.
        image: position of each detection's image, (D,).
        label: class of each detection, (D,).
        score: score of each detection, (D,).
        right: bool (T, D), whether the detection matches an object at each of T = 10 thresholds of intersection over
            union.
        ignored: bool (T, D), whether the detection is neither right nor wrong.
        object_image: position of each object's image, (G,); objects that need not be found are left out.
        object_label: class of each object, (G,).
    """

    shape: np.ndarray
    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    right: np.ndarray
    ignored: np.ndarray
    object_image: np.ndarray
    object_label: np.ndarray

    @staticmethod
    def from_cells(
        cells: Sequence[Mapping[str, Any]], image_ids: Sequence[Any], category_ids: Sequence[int]
    ) -> Matches:
        """Convert pycocotools' matches.

        Args:
            cells: matches of each image and category (`cells_of`), in the order in which pycocotools accumulates them.
            image_ids: id of each image, by position.
            category_ids: id of each class, by label.
        """
        positions = {id: position for position, id in enumerate(image_ids)}
        labels = {id: label for label, id in enumerate(category_ids)}
        places = np.array([(positions[cell["image_id"]], labels[cell["category_id"]]) for cell in cells], int)
        places = places.reshape(-1, 2)
        num_detections = np.array([len(cell["dtScores"]) for cell in cells], int)
        num_objects = np.array([np.count_nonzero(cell["gtIgnore"] == 0) for cell in cells], int)
        detections, objects = places.repeat(num_detections, 0), places.repeat(num_objects, 0)
        none = [np.zeros((NUM_THRESHOLDS, 0), bool)]
        right = np.concatenate([*none, *(cell["dtMatches"] != 0 for cell in cells)], 1)
        ignored = np.concatenate([*none, *(cell["dtIgnore"].astype(bool) for cell in cells)], 1)
        score = np.concatenate([np.zeros(0), *(cell["dtScores"] for cell in cells)])
        return Matches(
            np.array([len(image_ids), len(category_ids), 1]),
            detections[:, 0].astype(np.int32),
            detections[:, 1].astype(np.int32),
            score,
            right & ~ignored,
            ignored,
            objects[:, 0].astype(np.int32),
            objects[:, 1].astype(np.int32),
        )

    @staticmethod
    def join(parts: Sequence[Matches], positions: Sequence[np.ndarray], num_images: int) -> Matches:
        """Join the matches of several sets, whose figures are averaged.

        Args:
            parts: matches of each set.
            positions: positions of each set's images among the joined images.
            num_images: number of joined images.
        """
        num_classes = int(parts[0].shape[1])
        shape = np.array([num_images, num_classes, len(parts)])
        columns = {
            "image": [place[part.image] for part, place in zip(parts, positions, strict=True)],
            "object_image": [place[part.object_image] for part, place in zip(parts, positions, strict=True)],
            "label": [part.label + i * num_classes for i, part in enumerate(parts)],
            "object_label": [part.object_label + i * num_classes for i, part in enumerate(parts)],
            **{name: [getattr(part, name) for part in parts] for name in ("score", "right", "ignored")},
        }
        return Matches(shape, **{name: np.concatenate(arrays, -1) for name, arrays in columns.items()})

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> Matches:
        """Return the matches of these attributes."""
        return Matches(**{field.name: arrays[field.name] for field in fields(Matches)})

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the attributes by name."""
        return {field.name: getattr(self, field.name) for field in fields(Matches)}

    @cached_property
    def _classes(self) -> list[tuple[np.ndarray, list[np.ndarray], np.ndarray | None]]:
        """Detections of each class in descending order of score, for `class_precision`.

        They are the image (D,), the places of the right ones at each threshold, and bool (T, D), whether a detection is
        not ignored, or None if no detection is ignored.
        """
        order = np.lexsort((-self.score, self.label))
        ends = np.searchsorted(self.label[order], np.arange(self.shape[1] * self.shape[2] + 1))
        classes = []
        for start, end in pairwise(ends):
            part = order[start:end]
            counted = ~self.ignored[:, part]
            places = [np.flatnonzero(row) for row in self.right[:, part]]
            classes.append((self.image[part], places, None if counted.all() else counted))
        return classes

    def class_precision(self, draws: np.ndarray | None = None) -> np.ndarray:
        """Return the average precision of each class at each threshold, (T, S * K); NaN for a class without objects.

        Args:
            draws: (N,), how often each image counts, as if the set had copies of the image. Default: once.
        """
        draws = np.ones(self.shape[0]) if draws is None else draws
        objects = np.bincount(self.object_label, draws[self.object_image], self.shape[1] * self.shape[2])
        precision = np.full((len(self.right), len(objects)), np.nan)
        for label, (image, places, counted) in enumerate(self._classes):
            if not objects[label]:
                continue
            weights = draws[image]
            ranks = weights.cumsum()
            for row, right in enumerate(places):
                # Precision has its peaks at right detections, so the others only count in the ranks.
                if counted is not None:
                    ranks = (weights * counted[row]).cumsum()
                found = weights[right].cumsum()
                # pycocotools adds this smallest number as well.
                at_score = found / (ranks[right] + np.spacing(1))
                best = np.maximum.accumulate(at_score[::-1])[::-1]
                reached = np.searchsorted(found / objects[label], RECALLS)
                precision[row, label] = best[reached[reached < len(best)]].sum() / len(RECALLS)
        return precision

    def figures(self, draws: np.ndarray | None = None) -> np.ndarray:
        """Return `FIGURES` and the average precision of each label, (3 + K,): means over the sets, NaN without objects.

        Args:
            draws: (N,), how often each image counts. Default: once.
        """
        _, num_classes, num_sets = self.shape
        precision = self.class_precision(draws).reshape(-1, num_sets, num_classes)
        of_classes = _mean(precision.mean(0), 0)
        thresholds = (slice(None), [0], [NUM_THRESHOLDS // 2])
        overall = [_mean(_mean(precision[rows].mean(0), 1), 0) for rows in thresholds]
        return np.array([*overall, *of_classes])

    def intervals(self, count: int = HALF_SAMPLES, seed: int = 0) -> np.ndarray:
        """Return the 95 % intervals of `figures` from half-samples of the images, (3 + K, 2); NaN for one image.

        Precision is accumulated anew in each half-sample: a mean of figures of single images would be another figure.
        """
        n = int(self.shape[0])
        if n < 2:
            return np.full((len(FIGURES) + int(self.shape[1]), 2), np.nan)
        halves = [self.figures(draws) for draws in draw_halves(n, count, seed)]
        return half_sample_intervals(self.figures(), np.array(halves), n)


def cells_of(evaluator: COCOeval) -> list[Mapping[str, Any]]:
    """Return the matches of each image and category that an evaluator has found, for objects of all sizes."""
    all_sizes = evaluator.params.areaRng[0]
    return [cell for cell in evaluator.evalImgs if cell is not None and cell["aRng"] == all_sizes]


def _mean(values: np.ndarray, axis: int) -> Any:
    """Return the mean of the values that are not NaN; NaN if there is none."""
    defined = np.isfinite(values)
    counts = defined.sum(axis)
    return np.where(counts > 0, np.where(defined, values, 0).sum(axis) / np.maximum(counts, 1), np.nan)
