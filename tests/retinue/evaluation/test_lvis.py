"""LVIS's rules: agreement with LVIS's own API, and each rule on detections whose figures are known."""

from typing import Any

import numpy as np
import pytest

from retinue.evaluation.detection import coco_results, evaluate
from retinue.evaluation.lvis import MAX_DETECTIONS, evaluate_federated
from tests.retinue.evaluation.test_detection import CATEGORIES, IMAGES, ONE, make_truth, noisy, perfect

# pycocotools warns with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
# Figures that lvis-api's LVISEval (repository lvis-dataset/lvis-api) gives for `make_federated(0)`.
LVIS_API = {
    "box": {
        "ap": 0.5999520791, "ap50": 0.7384829866, "ap75": 0.6161082106, "ap_small": 0.7540403890,
        "ap_medium": 0.7210160302, "ap_large": 0, "ap_rare": 0.4878925410, "ap_common": 0.3614686469,
        "ap_frequent": 0.9504950495, "ar300": 0.7868589744, "ar_small": 0.8696969697, "ar_medium": 0.8266666667,
        "ar_large": 0,
    },
    "mask": {
        "ap": 0.6031304538, "ap50": 0.7384829866, "ap75": 0.6161082106, "ap_small": 0.6514235484,
        "ap_medium": 0.7646864686, "ap_large": 0, "ap_rare": 0.4800066373, "ap_common": 0.3788896747,
        "ap_frequent": 0.9504950495, "ar300": 0.7926282051, "ar_small": 0.8666666667, "ar_medium": 0.84,
        "ar_large": 0,
    },
}  # fmt: skip


def make_federated(seed: int = 0) -> dict[str, Any]:
    """Return annotations in which categories without objects are negative or unknown, and some are incomplete."""
    truth, rng = make_truth(seed), np.random.default_rng(seed)
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = 0
    for image in truth["images"]:
        present = {row["category_id"] for row in truth["annotations"] if row["image_id"] == image["id"]}
        image["neg_category_ids"] = [id for id in CATEGORIES if id not in present and rng.random() < 0.5]
        image["not_exhaustive_category_ids"] = [id for id in sorted(present) if rng.random() < 0.4]
    for category, frequency in zip(truth["categories"], "rfc", strict=True):
        category["frequency"] = frequency
    return truth


def figures(kind: str, results: list[dict], truth: dict[str, Any]) -> dict[str, float | None]:
    return evaluate_federated(kind, results, truth, IMAGES, CATEGORIES).figures


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_figures_are_those_of_lvis_api(kind):
    truth = make_federated()
    results = coco_results(noisy(truth), IMAGES, CATEGORIES)
    ours = figures(kind, results, truth)
    assert ours == pytest.approx(LVIS_API[kind], abs=1e-9)
    assert list(ours) == list(LVIS_API[kind])
    # The rules matter: COCO's figure is another one.
    assert ours["ap"] != pytest.approx(evaluate(kind, results, truth, IMAGES, CATEGORIES).figures["ap"], abs=1e-3)


def single(position: int, category: int) -> dict[str, Any]:
    """Return a wrong detection with a high score."""
    return {"image_id": IMAGES[position], "category_id": category, "bbox": [1, 1, 30, 30], "score": 0.99}


def test_detections_of_unknown_categories_do_not_count():
    truth = make_federated()
    truth["images"][0] |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    truth["annotations"] = [row for row in truth["annotations"] if row["image_id"] != IMAGES[0]]
    found = coco_results([image for image in perfect(truth) if image.index], IMAGES, CATEGORIES)
    wrong = [single(0, category) for category in CATEGORIES]
    assert figures("box", [*found, *wrong], truth)["ap"] == ONE
    truth["images"][0]["neg_category_ids"] = [CATEGORIES[0]]
    accuracy = evaluate_federated("box", [*found, *wrong], truth, IMAGES, CATEGORIES)
    assert accuracy.class_ap[0] < 0.95
    assert accuracy.class_ap[1:] == pytest.approx([1, 1], abs=1e-12)


def test_further_detections_of_an_incomplete_category_are_not_wrong():
    truth = make_federated()
    category = truth["annotations"][0]["category_id"]
    found = coco_results(perfect(truth), IMAGES, CATEGORIES)
    for incomplete, is_right in (([category], True), ([], False)):
        truth["images"][0]["not_exhaustive_category_ids"] = incomplete
        ap = figures("box", [*found, single(0, category)], truth)["ap"]
        assert (ap == ONE) is is_right


def test_detections_after_the_best_300_of_an_image_do_not_count():
    truth = make_federated()
    truth["images"][0]["neg_category_ids"] = []
    found = coco_results(perfect(truth), IMAGES, CATEGORIES)
    unknown = next(id for id in CATEGORIES if id != truth["annotations"][0]["category_id"])
    truth["annotations"] = [
        row for row in truth["annotations"] if row["image_id"] != IMAGES[0] or row["category_id"] != unknown
    ]
    better = [single(0, unknown) for _ in range(MAX_DETECTIONS)]
    assert figures("box", found, truth)["ar300"] == ONE
    recall = figures("box", [*found, *better], truth)["ar300"]
    assert recall is not None and recall < 0.9


def test_frequencies_may_be_missing():
    truth = make_federated()
    found = coco_results(perfect(truth), IMAGES, CATEGORIES)
    for category in truth["categories"]:
        del category["frequency"]
    ours = figures("box", found, truth)
    assert ours["ap"] == ONE
    assert ours["ap_rare"] is None
