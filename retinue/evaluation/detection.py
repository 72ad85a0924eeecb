"""Evaluation of detection: COCO's figures of boxes and masks, and files in COCO's results format.

pycocotools is the reference evaluator (Microsoft COCO, arXiv:1405.0312; repository cocodataset/cocoapi).
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinue.evaluation.detection_matches import Matches, cells_of
from retinue.utils.coco_masks import encloses_pixels, run_lengths
from retinue.utils.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

# Names of pycocotools for our two kinds of predictions.
IOU_TYPES: dict[str, Any] = {"box": "bbox", "mask": "segm"}
# Names of the twelve figures, in the order of pycocotools' summary.
FIGURES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
# Sizes of objects in pycocotools' order: all, up to 32 x 32 pixels, up to 96 x 96 pixels, and above.
SIZES = ("all", "small", "medium", "large")
# Thresholds of intersection over union over which average precision is averaged.
IOUS = np.linspace(0.5, 0.95, 10)


@dataclass(frozen=True)
class ImageDetections:
    """Detections in one image, in descending order of their scores.

    Attributes:
        index: position of the image in its split; -1 marks padding.
        size: height and width of the original image.
        boxes: float32 (N, 4), (x1, y1, x2, y2) in pixels of the original image.
        scores: float32 (N,).
        labels: int64 (N,).
        masks: N masks of the size of the original image, as COCO's compressed run lengths. None if the detector
            predicts no masks.
    """

    index: int
    size: tuple[int, int]
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[bytes] | None

    @staticmethod
    def from_tensors(
        index: int, boxes: Tensor, scores: Tensor, labels: Tensor, masks: Tensor | None, size: Sequence[int]
    ) -> ImageDetections:
        """Sort and convert the output of a detector for one image.

        Args:
            index: position of the image in its split.
            boxes: (N, 4), (x1, y1, x2, y2) in pixels of the original image.
            scores: (N,).
            labels: (N,).
            masks: bool (N, H, W), or None.
            size: height and width (H, W) of the original image.
        """
        order = scores.float().argsort(descending=True, stable=True)
        height, width = (int(side) for side in size)
        counts = None
        if masks is not None:
            # pycocotools needs (H, W, N) in Fortran order, which is (N, W, H) in memory.
            columns = masks[order].transpose(1, 2).contiguous().byte().cpu().numpy()
            encoded: Any = rle.encode(columns.transpose(2, 1, 0))
            counts = [mask["counts"] for mask in encoded]
        return ImageDetections(
            index,
            (height, width),
            boxes[order].float().cpu().numpy(),
            scores[order].float().cpu().numpy(),
            labels[order].cpu().numpy(),
            counts,
        )


def merge(detections: Iterable[ImageDetections]) -> list[ImageDetections]:
    """Return the detections sorted by index: each image once, without padding (index -1)."""
    by_index: dict[int, ImageDetections] = {}
    for image in detections:
        by_index.setdefault(image.index, image)
    return [by_index[index] for index in sorted(by_index) if index >= 0]


def coco_results(
    detections: Iterable[ImageDetections], image_ids: Sequence[Any], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Convert detections to COCO's results format.

    Args:
        detections: detections of several images.
        image_ids: id of each image, by position in the split.
        category_ids: id of each class, by label.

    Returns:
        A dict for each detection: `image_id`, `category_id`, `bbox` (x, y, width, height), `score` and, if there are
        masks, `segmentation` (compressed run lengths).
    """
    results = []
    for image in detections:
        corners = image.boxes.astype(np.float64)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).round(3).tolist()
        for i, (box, score, label) in enumerate(zip(boxes, image.scores.tolist(), image.labels, strict=True)):
            result = {
                "image_id": image_ids[image.index],
                "category_id": category_ids[label],
                "bbox": box,
                "score": score,
            }
            if image.masks is not None:
                result["segmentation"] = {"size": list(image.size), "counts": image.masks[i].decode("ascii")}
            results.append(result)
    return results


def decode_mask(segmentation: Any, size: Sequence[int]) -> np.ndarray:
    """Decode COCO's polygons or run lengths to bool (H, W), for an image of `size` (H, W)."""
    return rle.decode(run_lengths(segmentation, *size)).astype(bool)


def write_results(path: str | Path, results: Sequence[Mapping]) -> None:
    """Write results as JSON, in the format that COCO's evaluation servers accept."""
    write_text(path, json.dumps(results, separators=(",", ":")))


@dataclass(frozen=True)
class Accuracy:
    """Result of COCO's evaluation of boxes or of masks.

    Attributes:
        figures: the twelve figures, by the names in `FIGURES`. None if no object has an area in the range of the
            figure.
        size_precision: (10, 101, K, 4), precision at each threshold in `IOUS`, at recall 0, 0.01, ..., 1, for each
            label and for each of `SIZES`. NaN for a label without objects of the size.
        matches: the matches from which average precision follows for any choice of the images.
    """

    figures: dict[str, float | None]
    size_precision: np.ndarray
    matches: Matches

    @property
    def precision(self) -> np.ndarray:
        """Precision for objects of all sizes, (10, 101, K)."""
        return self.size_precision[..., 0]

    @property
    def class_ap(self) -> np.ndarray:
        """Average precision of each label, (K,); NaN for a label without objects."""
        return self.precision.mean((0, 1))


def average(accuracies: Sequence[Accuracy], positions: Sequence[np.ndarray], num_images: int) -> Accuracy:
    """Average accuracies of several sets; a figure or a class that a set lacks is averaged over the other sets.

    Args:
        accuracies: accuracy of each set.
        positions: positions of each set's images among the images of all sets.
        num_images: number of images of all sets.
    """
    figures = {}
    for name in FIGURES:
        values = [value for accuracy in accuracies if (value := accuracy.figures[name]) is not None]
        figures[name] = sum(values) / len(values) if values else None
    precision = np.ma.masked_invalid([accuracy.size_precision for accuracy in accuracies]).mean(0)
    matches = Matches.join([accuracy.matches for accuracy in accuracies], positions, num_images)
    return Accuracy(figures, precision.filled(np.nan), matches)


def evaluate(
    kind: str,
    results: Sequence[Mapping[str, Any]],
    truth: Mapping[str, Any],
    image_ids: Sequence[Any],
    category_ids: Sequence[int],
) -> Accuracy:
    """Compute average precision and recall with pycocotools.

    Crowds are ignored: they need not be detected, and detections on them are not wrong. In the evaluation of masks this
    also holds for objects whose mask is empty or has no polygon with three corners.

    Args:
        kind: `box` or `mask`.
        results: detections in COCO's results format (`coco_results`).
        truth: annotations in COCO's format; they are not changed.
        image_ids: ids of the images to evaluate.
        category_ids: id of each class, by label.
    """
    objects, detections = prepare(kind, results, truth, image_ids)
    # pycocotools prints its progress and its summary.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(as_coco(truth, objects), as_coco(truth, detections), IOU_TYPES[kind])
        evaluator.params.imgIds, evaluator.params.catIds = list(image_ids), list(category_ids)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    figures = {name: None if value < 0 else float(value) for name, value in zip(FIGURES, evaluator.stats, strict=True)}
    # Precision for 100 detections per image, sorted by category id; it is put in the order of the labels.
    precision = evaluator.eval["precision"][..., -1]
    precision = precision[:, :, np.argsort(np.argsort(category_ids))]
    matches = Matches.from_cells(cells_of(evaluator), image_ids, category_ids)
    return Accuracy(figures, np.where(precision < 0, np.nan, precision), matches)


def prepare(
    kind: str, results: Sequence[Mapping[str, Any]], truth: Mapping[str, Any], image_ids: Sequence[Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return copies of the objects and of the detections in the form that pycocotools evaluates.

    Args:
        kind: `box` or `mask`.
        results: detections in COCO's results format (`coco_results`).
        truth: annotations in COCO's format.
        image_ids: ids of the images to evaluate.
    """
    evaluated_ids = set(image_ids)
    annotations = [annotation for annotation in truth["annotations"] if annotation["image_id"] in evaluated_ids]
    # The annotations are copied because pycocotools writes into them. Their ids start at 1 because pycocotools treats a
    # match with id 0 as no match.
    objects = [{"iscrowd": 0, **annotation, "id": i} for i, annotation in enumerate(annotations, 1)]
    if kind == "mask":
        sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
        for annotation in objects:
            if not encloses_pixels(annotation["segmentation"]):
                x, y, width, height = annotation["bbox"]
                box = [[x, y, x + width, y, x + width, y + height, x, y + height]]
                annotation |= {"iscrowd": 1, "segmentation": box}
            annotation["segmentation"] = run_lengths(annotation["segmentation"], *sizes[annotation["image_id"]])
    detections = [{**result, "id": i, "iscrowd": 0, "area": _area(kind, result)} for i, result in enumerate(results, 1)]
    return objects, detections


def per_class(
    accuracies: Mapping[str, Accuracy],
    truth: Mapping[str, Any],
    image_ids: Sequence[Any],
    category_ids: Sequence[int],
    class_names: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Return {name: {n, box_ap, mask_ap}}: each class's number of objects, without crowds, and its average precision.

    Args:
        accuracies: results of `evaluate` by kind, `box` or `mask`.
        truth: annotations in COCO's format.
        image_ids: ids of the evaluated images.
        category_ids: id of each class, by label.
        class_names: name of each class, by label. If several classes have the same name, their labels follow the name.

    Returns:
        The table; average precision is None for a class without objects.
    """
    evaluated_ids = set(image_ids)
    repeated = {name for name, count in Counter(class_names).items() if count > 1}
    objects = Counter(
        annotation["category_id"]
        for annotation in truth["annotations"]
        if annotation["image_id"] in evaluated_ids and not annotation.get("iscrowd", 0)
    )
    table = {}
    for label, name in enumerate(class_names):
        row: dict[str, Any] = {"n": objects[category_ids[label]]}
        for kind, accuracy in accuracies.items():
            ap = float(accuracy.class_ap[label])
            row[f"{kind}_ap"] = None if np.isnan(ap) else ap
        table[f"{name} ({label})" if name in repeated else name] = row
    return table


def _area(kind: str, result: Mapping[str, Any]) -> float:
    """Return the area of a detection in pixels; pycocotools uses it for detections that match no object."""
    return result["bbox"][2] * result["bbox"][3] if kind == "box" else float(rle.area(result["segmentation"]))


def as_coco(truth: Mapping[str, Any], annotations: list[dict[str, Any]]) -> COCO:
    """Return pycocotools' index of the annotations of `truth`'s images and categories."""
    coco: Any = COCO()
    coco.dataset = {"images": truth["images"], "categories": truth["categories"], "annotations": annotations}
    coco.createIndex()
    return coco
