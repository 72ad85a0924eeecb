"""Evaluation of detection by LVIS's rules, for annotations that are complete for a part of the categories only.

LVIS: A Dataset for Large Vocabulary Instance Segmentation (Gupta, Dollar, Girshick, CVPR 2019, arXiv:1908.03195;
repository lvis-dataset/lvis-api, BSD 2-Clause). The rules are written anew on pycocotools' matching.
"""

import contextlib
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from retinue.evaluation.detection import IOU_TYPES, IOUS, Accuracy, as_coco, prepare
from retinue.evaluation.detection_matches import Matches, cells_of

# Largest number of detections of an image, over all categories.
MAX_DETECTIONS = 300
# Names of pycocotools' ranges of area, in its order.
AREAS = ("all", "small", "medium", "large")
# Names of the groups of categories by the letter in the annotations.
GROUPS = {"r": "rare", "c": "common", "f": "frequent"}


def evaluate_federated(
    kind: str,
    results: Sequence[Mapping[str, Any]],
    truth: Mapping[str, Any],
    image_ids: Sequence[Any],
    category_ids: Sequence[int],
) -> Accuracy:
    """Compute average precision and recall by LVIS's rules.

    They differ from COCO's in four points. The 300 detections with the highest scores of an image count. Detections of
    a category count only in images that have an object of the category or are known to have none
    (`neg_category_ids`). In images whose objects of the category may be incomplete (`not_exhaustive_category_ids`), a
    detection without an object is not wrong. Average precision is also given for rare, common and frequent categories.

    Args:
        kind: `box` or `mask`.
        results: detections in COCO's results format.
        truth: annotations in LVIS's format; they are not changed.
        image_ids: ids of the images to evaluate.
        category_ids: id of each class, by label.

    Returns:
        The figures `ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large`, `ap_rare`, `ap_common`, `ap_frequent`,
        `ar300`, `ar_small`, `ar_medium` and `ar_large`, and the precision of each class.
    """
    images = {image["id"]: image for image in truth["images"]}
    objects, detections = prepare(kind, _best(results), truth, image_ids)
    # Each has an entry per category: objects, detections, images where it was looked for, and where it is incomplete.
    objects_of, detections_of = defaultdict[int, list](list), defaultdict[int, list](list)
    looked_for, incomplete = defaultdict[int, set](set), defaultdict[int, set](set)
    for id in image_ids:
        for category in images[id]["neg_category_ids"]:
            looked_for[category].add(id)
        for category in images[id]["not_exhaustive_category_ids"]:
            incomplete[category].add(id)
    for annotation in objects:
        objects_of[annotation["category_id"]].append(annotation)
        looked_for[annotation["category_id"]].add(annotation["image_id"])
    for detection in detections:
        if detection["image_id"] in looked_for[detection["category_id"]]:
            detections_of[detection["category_id"]].append(detection)

    shape = (len(IOUS), len(category_ids), len(AREAS))
    precision, recall = np.full((len(IOUS), 101, *shape[1:]), np.nan), np.full(shape, np.nan)
    cells = []
    # A category is evaluated on the images in which it was looked for. All images with all categories of LVIS would be
    # 24 million pairs.
    for label, category in enumerate(category_ids):
        if not objects_of[category]:
            continue
        part = {"images": [images[id] for id in looked_for[category]], "categories": [{"id": category}]}
        # pycocotools prints its progress.
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator = COCOeval(
                as_coco(part, objects_of[category]), as_coco(part, detections_of[category]), IOU_TYPES[kind]
            )
            evaluator.params.maxDets = [MAX_DETECTIONS]
            evaluator.evaluate()
            for matches in evaluator.evalImgs:
                if matches is not None and matches["image_id"] in incomplete[category]:
                    matches["dtIgnore"] |= matches["dtMatches"] == 0
            evaluator.accumulate()
        cells += cells_of(evaluator)
        precision[:, :, label] = evaluator.eval["precision"][:, :, 0, :, 0]
        recall[:, label] = evaluator.eval["recall"][:, 0, :, 0]
    precision, recall = (np.where(values < 0, np.nan, values) for values in (precision, recall))
    matches = Matches.from_cells(cells, image_ids, category_ids)
    return Accuracy(_figures(precision, recall, truth["categories"], category_ids), precision, matches)


def _best(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the detections with the highest scores of each image."""
    by_image = defaultdict[Any, list[Mapping[str, Any]]](list)
    for result in results:
        by_image[result["image_id"]].append(result)
    ranked = (sorted(image, key=lambda result: -result["score"]) for image in by_image.values())
    return [result for image in ranked for result in image[:MAX_DETECTIONS]]


def _figures(
    precision: np.ndarray, recall: np.ndarray, categories: Sequence[Mapping[str, Any]], category_ids: Sequence[int]
) -> dict[str, float | None]:
    """Return the figures.

    Args:
        precision: (10, 101, K, 4) by threshold, recall, label and range of area; NaN without objects.
        recall: (10, K, 4).
        categories: categories in LVIS's format.
        category_ids: id of each class, by label.
    """
    frequency = {category["id"]: category.get("frequency") for category in categories}
    frequencies = np.array([frequency[id] for id in category_ids])
    values = {
        "ap": precision[..., 0],
        "ap50": precision[np.isclose(IOUS, 0.5), ..., 0],
        "ap75": precision[np.isclose(IOUS, 0.75), ..., 0],
        **{f"ap_{area}": precision[..., i] for i, area in enumerate(AREAS) if i},
        **{f"ap_{group}": precision[:, :, frequencies == letter, 0] for letter, group in GROUPS.items()},
        f"ar{MAX_DETECTIONS}": recall[..., 0],
        **{f"ar_{area}": recall[..., i] for i, area in enumerate(AREAS) if i},
    }
    return {name: None if np.isnan(value).all() else float(np.nanmean(value)) for name, value in values.items()}
