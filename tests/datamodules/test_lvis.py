"""LVIS's annotation files: names in coco_url, categories that were looked for, subsets, and errors."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.coco import Coco
from retinue.evaluation.detection import ImageDetections
from retinue.tasks.detection import Detection


def content():
    """Return three images; the first has a category without complete objects, the last has no object."""
    url = "http://images.cocodataset.org"
    images: list[dict[str, Any]] = [
        {"id": 7, "coco_url": f"{url}/train2017/7.jpg", "neg_category_ids": [5], "not_exhaustive_category_ids": [2]},
        {"id": 3, "coco_url": f"{url}/val2017/3.jpg", "neg_category_ids": [], "not_exhaustive_category_ids": []},
        {"id": 9, "coco_url": f"{url}/val2017/9.jpg", "neg_category_ids": [2, 1], "not_exhaustive_category_ids": []},
    ]
    for image in images:
        image |= {"height": 40, "width": 50}
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 2, "bbox": [5, 5, 20, 10], "area": 200.0},
        {"id": 2, "image_id": 3, "category_id": 1, "bbox": [1, 2, 30, 30], "area": 900.0},
    ]
    for row in annotations:
        x, y, w, h = row["bbox"]
        row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    names = {1: ("ant", "r"), 2: ("bee", "f"), 5: ("cow", "c")}
    categories = [{"id": id, "name": name, "frequency": letter} for id, (name, letter) in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def make_data(root, annotations, **kwargs):
    (root / "lvis.json").write_text(json.dumps(annotations))
    for folder, name in (("train2017", "7"), ("val2017", "3"), ("val2017", "9")):
        (root / folder).mkdir(exist_ok=True)
        Image.fromarray(np.full((40, 50, 3), 99, np.uint8)).save(root / folder / f"{name}.jpg")
    paths = {f"{split}_{what}": "lvis.json" if what == "annotations" else "." for split in ("train", "val")
             for what in ("annotations", "images")}  # fmt: skip
    return Coco(root=str(root), image_size=[40, 50], num_workers=0, **paths, **kwargs)


def test_what_is_read_is_what_evaluation_receives(tmp_path):
    data = make_data(tmp_path, content())
    assert data.names("val") == ["train2017/7.jpg", "val2017/3.jpg", "val2017/9.jpg"]
    assert data.images("val")[2]["image"].shape == (40, 50, 3)
    truth, expected = data.images("val").truth, content()
    for ours, theirs in zip(truth["images"], expected["images"], strict=True):
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            assert ours[key] == theirs[key]
    assert truth["categories"] == expected["categories"]
    assert data.has_masks
    # Training leaves out the image without objects.
    assert data.names("train") == ["train2017/7.jpg", "val2017/3.jpg"]
    assert data.images("train").truth["images"][1]["neg_category_ids"] == []


def test_a_subset_of_the_categories(tmp_path):
    data = make_data(tmp_path, content(), classes=["cow", "bee"])
    truth = data.images("val").truth
    assert [image["neg_category_ids"] for image in truth["images"]] == [[5], [], [2]]
    assert [category["frequency"] for category in truth["categories"]] == ["f", "c"]


def test_the_task_evaluates_by_the_rules_of_lvis(tmp_path):
    data = make_data(tmp_path, content())
    boxes = np.array([[5, 5, 25, 15], [5, 5, 25, 15]], np.float32)
    # The second detection is of a category that was looked for and not found.
    found = ImageDetections(0, (40, 50), boxes, np.array([0.5, 0.9], np.float32), np.array([1, 2]), None)
    task = SimpleNamespace(model=SimpleNamespace(masks=False))
    accuracies, _ = Detection._evaluate(task, [found], data, "val")  # type: ignore[arg-type]
    accuracy = accuracies["box"]
    assert accuracy.figures["ap_frequent"] == pytest.approx(1)
    assert accuracy.figures["ap_common"] is None
    assert "ar300" in accuracy.figures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][1].pop("neg_category_ids"), "image 3 has 'neg_category_ids' None: expected a list"),
        (lambda c: c["images"][0]["neg_category_ids"].append(8), "image 7 has 'neg_category_ids' [5, 8]: expected"),
        (lambda c: c["images"][0].update(not_exhaustive_category_ids=2), "image 7 has 'not_exhaustive_category_ids' 2"),
        (lambda c: c["categories"][2].update(frequency="x"), "category 5 has the frequency 'x': expected r, c or f"),
        (lambda c: c["categories"][2].pop("frequency"), "category 5 has the frequency None: expected r, c or f"),
        (lambda c: c["images"][1].pop("coco_url"), "images[0] has no 'file_name'"),
    ],
)  # fmt: skip
def test_errors_are_one_line(tmp_path, change, message):
    annotations = content()
    change(annotations)
    with pytest.raises(ValueError) as error:
        make_data(tmp_path, annotations).images("val")
    assert message in str(error.value)
