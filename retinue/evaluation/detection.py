"""What a detector's predictions are worth: COCO's figures of boxes and masks, and the results file that COCO defines.

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

from retinue.utils.files import replacing
from retinue.utils.masks import run_lengths

if TYPE_CHECKING:
    from torch import Tensor

KINDS: dict[str, Any] = {"box": "bbox", "mask": "segm"}  # ours -> pycocotools'
FIGURES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip  # in the order of pycocotools' summary
IOUS = np.linspace(0.5, 0.95, 10)


@dataclass(frozen=True)
class ImageDetections:
    """What was found in one image, the likeliest first; boxes and masks are in pixels of the original image."""

    index: int  # position in the split
    size: tuple[int, int]  # height, width
    boxes: np.ndarray  # (N, 4) float32: x1, y1, x2, y2
    scores: np.ndarray  # (N,) float32
    labels: np.ndarray  # (N,) int64
    masks: list[bytes] | None  # COCO's compressed run lengths; None from a detector without masks

    @staticmethod
    def from_tensors(
        index: int, boxes: Tensor, scores: Tensor, labels: Tensor, masks: Tensor | None, size: Sequence[int]
    ) -> ImageDetections:
        """`masks` is bool (N, H, W), `size` the image's (H, W)."""
        order = scores.float().argsort(descending=True, stable=True)
        height, width = (int(side) for side in size)
        counts = None
        if masks is not None:
            # pycocotools reads columns: (N, H, W) → (N, W, H) in memory, seen as (H, W, N) in Fortran's order
            columns = masks[order].transpose(1, 2).contiguous().byte().cpu().numpy()
            encoded: Any = rle.encode(columns.transpose(2, 1, 0))
            counts = [each["counts"] for each in encoded]
        return ImageDetections(
            index,
            (height, width),
            boxes[order].float().cpu().numpy(),
            scores[order].float().cpu().numpy(),
            labels[order].cpu().numpy(),
            counts,
        )


def merge(detections: Iterable[ImageDetections]) -> list[ImageDetections]:
    """By index, each image once, padding (index -1) left out."""
    first: dict[int, ImageDetections] = {}
    for each in detections:
        first.setdefault(each.index, each)
    return [first[index] for index in sorted(first) if index >= 0]


def coco_results(
    detections: Iterable[ImageDetections], image_ids: Sequence[Any], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """COCO's results format: `image_id`, `category_id`, `bbox` (x, y, width, height), `score` and, of masks,
    `segmentation` (compressed run lengths).

    Args:
        image_ids: by position in the split.
        category_ids: by label.
    """
    results = []
    for found in detections:
        corners = found.boxes.astype(np.float64)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).round(3).tolist()
        for i, (box, score, label) in enumerate(zip(boxes, found.scores.tolist(), found.labels, strict=True)):
            result = {
                "image_id": image_ids[found.index],
                "category_id": category_ids[label],
                "bbox": box,
                "score": score,
            }
            if found.masks is not None:
                result["segmentation"] = {"size": list(found.size), "counts": found.masks[i].decode("ascii")}
            results.append(result)
    return results


def decode_mask(segmentation: Any, size: Sequence[int]) -> np.ndarray:
    """(H, W) bool of COCO's polygons or run lengths, for an image of `size` (H, W)."""
    return rle.decode(run_lengths(segmentation, *size)).astype(bool)


def write_results(path: str | Path, results: Sequence[Mapping]) -> None:
    """As JSON, in the form that COCO's evaluation servers take."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(results, separators=(",", ":")))


@dataclass(frozen=True)
class Accuracy:
    """COCO's evaluation of boxes or of masks."""

    figures: dict[str, float | None]  # the twelve, by `FIGURES`; None of an area range without objects
    precision: np.ndarray  # (10, 101, K): at the `IOUS`, recall 0, 0.01, ..., 1, of each label; NaN without objects

    @property
    def class_ap(self) -> np.ndarray:
        """(K,): average precision of each label; NaN without objects."""
        return self.precision.mean((0, 1))


def evaluate(
    kind: str,
    results: Sequence[Mapping[str, Any]],
    truth: Mapping[str, Any],
    image_ids: Sequence[Any],
    category_ids: Sequence[int],
) -> Accuracy:
    """Average precision and recall by pycocotools, over `image_ids`; a crowd is neither to be found nor wrong to find.

    Args:
        kind: `box` or `mask`.
        results: as `coco_results` gives them.
        truth: annotations in COCO's format.
        image_ids: of the images that the detector has seen.
        category_ids: by label.
    """
    seen = set(image_ids)
    # Copied, since pycocotools writes into them; numbered from 1, since it takes a match with number 0 for none.
    there = [each for each in truth["annotations"] if each["image_id"] in seen]
    objects = [{"iscrowd": 0, **each, "id": i} for i, each in enumerate(there, 1)]
    if kind == "mask":
        sizes = {each["id"]: (each["height"], each["width"]) for each in truth["images"]}
        for each in objects:
            each["segmentation"] = run_lengths(each["segmentation"], *sizes[each["image_id"]])
    found = [{**each, "id": i, "iscrowd": 0, "area": _area(kind, each)} for i, each in enumerate(results, 1)]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        evaluator = COCOeval(_coco(truth, objects), _coco(truth, found), KINDS[kind])
        evaluator.params.imgIds, evaluator.params.catIds = list(image_ids), list(category_ids)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    figures = {name: None if value < 0 else float(value) for name, value in zip(FIGURES, evaluator.stats, strict=True)}
    precision = evaluator.eval["precision"][..., 0, -1]  # of all areas and 100 detections, by ascending category id
    precision = precision[..., np.argsort(np.argsort(category_ids))]
    return Accuracy(figures, np.where(precision < 0, np.nan, precision))


def per_class(
    accuracies: Mapping[str, Accuracy],
    truth: Mapping[str, Any],
    image_ids: Sequence[Any],
    category_ids: Sequence[int],
    class_names: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """{name: {n, box_ap, mask_ap}}: objects that are no crowd, and the average precision; None for a class without.

    Where two classes have one name, their numbers stand behind it.
    """
    seen, repeated = set(image_ids), {name for name, times in Counter(class_names).items() if times > 1}
    objects = Counter(
        each["category_id"] for each in truth["annotations"] if each["image_id"] in seen and not each.get("iscrowd", 0)
    )
    table = {}
    for label, name in enumerate(class_names):
        aps = {f"{kind}_ap": float(each.class_ap[label]) for kind, each in accuracies.items()}
        figures = {key: None if np.isnan(ap) else ap for key, ap in aps.items()}
        table[f"{name} ({label})" if name in repeated else name] = {"n": objects[category_ids[label]], **figures}
    return table


def _area(kind: str, result: Mapping[str, Any]) -> float:
    """In pixels: pycocotools judges a detection that meets no object by the range that its area is in."""
    return result["bbox"][2] * result["bbox"][3] if kind == "box" else float(rle.area(result["segmentation"]))


def _coco(truth: Mapping[str, Any], annotations: list[dict[str, Any]]) -> COCO:
    coco: Any = COCO()
    coco.dataset = {"images": truth["images"], "categories": truth["categories"], "annotations": annotations}
    coco.createIndex()
    return coco
