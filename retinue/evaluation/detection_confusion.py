"""Confusion matrix of detections: which classes a detector takes for each other, for background, or for objects."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as rle

from retinue.evaluation.detection import ImageDetections

# Name of the last row and column.
BACKGROUND = "background"


def confusion_matrix(
    detections: Iterable[ImageDetections],
    truth: Mapping[str, Any],
    image_ids: Sequence[Any],
    category_ids: Sequence[int],
    *,
    min_iou: float = 0.5,
    min_score: float = 0.3,
) -> np.ndarray:
    """Count the pairs of true and predicted classes of boxes.

    In each image, boxes and detections of any classes are paired one to one, the pair with the greatest IoU first, as
    in Ultralytics' matrix (https://github.com/ultralytics/ultralytics, read as a specification). The thresholds are
    those of mmdetection's tool (https://github.com/open-mmlab/mmdetection, Apache-2.0), which counts each detection for
    every object that it overlaps. An unpaired detection that has half of its area in a crowd does not count.

    Args:
        detections: detections of the evaluated images.
        truth: annotations in COCO's format.
        image_ids: id of each image, by position in the split.
        category_ids: id of each class, by label.
        min_iou: smallest IoU of a pair.
        min_score: smallest score of a detection that counts.

    Returns:
        int64 (K + 1, K + 1), at [t, p] the number of objects of class t that were detected as class p. The last column
        counts objects without a detection, and the last row detections without an object.
    """
    labels = {category: label for label, category in enumerate(category_ids)}
    background = len(category_ids)
    matrix = np.zeros((background + 1, background + 1), np.int64)
    by_image: dict[Any, list[Mapping[str, Any]]] = {}
    for annotation in truth["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    for image in detections:
        annotations = by_image.get(image_ids[image.index], [])
        objects = [annotation for annotation in annotations if not annotation.get("iscrowd", 0)]
        crowds = [annotation for annotation in annotations if annotation.get("iscrowd", 0)]
        true = np.array([labels[annotation["category_id"]] for annotation in objects], np.int64)
        scored = image.scores >= min_score
        predicted, boxes = image.labels[scored], image.boxes[scored].astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        pairs = _pairs(_overlaps(boxes, objects, is_crowd=False), min_iou)
        free_objects, free_detections = np.ones(len(true), bool), np.ones(len(boxes), bool)
        for detection, index in pairs:
            matrix[true[index], predicted[detection]] += 1
            free_objects[index] = free_detections[detection] = False
        if crowds:
            free_detections &= _overlaps(boxes, crowds, is_crowd=True).max(1, initial=0) < min_iou
        np.add.at(matrix[:, background], true[free_objects], 1)
        np.add.at(matrix[background], predicted[free_detections], 1)
    return matrix


def _overlaps(boxes: np.ndarray, annotations: Sequence[Mapping[str, Any]], *, is_crowd: bool) -> np.ndarray:
    """Return the IoU of boxes (D, 4), x, y, width and height, with annotations: (D, N); of crowds, the share inside."""
    if not len(boxes) or not annotations:
        return np.zeros((len(boxes), len(annotations)))
    true_boxes: Any = np.array([annotation["bbox"] for annotation in annotations], np.float64)
    return np.asarray(rle.iou(boxes, true_boxes, [int(is_crowd)] * len(annotations)))


def _pairs(overlaps: np.ndarray, min_iou: float) -> list[tuple[int, int]]:
    """Return pairs (row, column), each row and column at most once, in descending order of their overlap."""
    rows, columns = np.nonzero(overlaps >= min_iou)
    order = np.argsort(-overlaps[rows, columns], kind="stable")
    pairs, used_rows, used_columns = [], set(), set()
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if row not in used_rows and column not in used_columns:
            pairs.append((row, column))
            used_rows.add(row)
            used_columns.add(column)
    return pairs
