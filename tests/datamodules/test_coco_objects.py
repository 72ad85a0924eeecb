"""Objects that training ignores or leaves out, as in mmdetection and pycocotools, and subsets of the classes."""

import json
import logging
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from datamodules.coco_format import index_coco
from models.openmmlab.config import library
from retinue.evaluation.detection import evaluate
from tests.datamodules.test_detection import (
    CATEGORIES,
    HEIGHT,
    PATHS,
    WIDTH,
    annotation,
    compressed,
    content,
    make_data,
    polygon,
    rectangle,
    uncompressed,
    write,
)

BOX = (10, 20, 30, 25)
TWO_CORNERS = [[10, 20, 40, 45]]
NOTHING = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")


def truth_with(*annotations, every=12):
    """Return the usual content, with these annotations of the image `every` beside one plain object."""
    plain = annotation(1, every, 7, (5, 5, 12, 14), polygon(5, 5, 12, 14))
    others = [row for row in content()["annotations"] if row["image_id"] != every]
    return content() | {"annotations": [*others, plain, *annotations]}


@pytest.mark.parametrize(
    "segmentation",
    [TWO_CORNERS, [[10, 20, 40, 45], [1, 2]], [[10, 20, 40, 45, 30, 30, 5]], [], {}, [[]],
     uncompressed(NOTHING), compressed(NOTHING), [[70, 80, 80, 80, 80, 90]]],
)  # fmt: skip
def test_an_object_without_a_mask_is_ignored_and_disables_no_other_mask(tmp_path, segmentation):
    """Such an object trained Mask R-CNN on an empty mask, and `[]` disabled the masks of all others."""
    write(tmp_path, truth_with(annotation(2, 12, 90, BOX, segmentation)))
    data = make_data(tmp_path)
    assert data.has_masks
    sample = data.images("train")[0]
    assert sample["boxes"].tolist() == [[5, 5, 17, 19]]
    assert sample["ignored"].tolist() == [[10, 20, 40, 45]]
    assert sample["labels"].tolist() == [1]
    assert sample["masks"].sum((1, 2)).tolist() == [12 * 14]
    # A detector of boxes needs no mask.
    sample = make_data(tmp_path, read_masks=False).images("train")[0]
    assert sample["boxes"].tolist() == [[5, 5, 17, 19], [10, 20, 40, 45]]
    assert sample["ignored"].tolist() == []


def test_objects_without_a_mask_are_counted_in_one_warning(tmp_path, caplog):
    write(tmp_path, truth_with(annotation(2, 12, 90, BOX, []), annotation(3, 12, 90, BOX, TWO_CORNERS)))
    with caplog.at_level(logging.WARNING):
        make_data(tmp_path).images("train")
    assert (
        caplog.text.count("2 of 10 objects have an empty mask or no polygon with three corners, and are ignored") == 1
    )


@pytest.mark.parametrize("more", [{"ignore": 1}, {"area": 0}, {"area": -3.0}, {"ignore": True, "iscrowd": 1}])
def test_annotations_that_mmdetection_leaves_out_are_left_out(tmp_path, caplog, more):
    write(tmp_path, truth_with(annotation(2, 12, 90, BOX, polygon(*BOX), **more)))
    data = make_data(tmp_path)
    with caplog.at_level(logging.WARNING):
        sample = data.images("train")[0]
    assert sample["boxes"].tolist() == [[5, 5, 17, 19]]
    assert sample["ignored"].shape == (0, 4)
    assert "1 annotations with `ignore` or without an area are left out" in caplog.text


def test_training_objects_equal_mmdetections(tmp_path):
    library("mmdet")
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations

    extra: list[Any] = [
        annotation(2, 12, 90, BOX, TWO_CORNERS),
        annotation(3, 12, 90, BOX, [[1, 2, 3], *polygon(*BOX)]),
        annotation(4, 12, 3, BOX, polygon(*BOX), ignore=1),
        annotation(5, 12, 3, BOX, polygon(*BOX), area=0),
        annotation(6, 12, 3, (1, 1, 20, 9), uncompressed(rectangle(1, 1, 20, 9)), iscrowd=1),
        annotation(7, 12, 3, (1, 1, 0.5, 9), polygon(1, 1, 0.5, 9)),
        annotation(8, 12, 7, (50, 0, 40, 12), compressed(rectangle(50, 0, 40, 12))),
    ]
    write(tmp_path, truth_with(*extra))
    for classes in (["dog", "cat", "kite"], ["kite", "cat"]):
        theirs = CocoDataset(
            ann_file=str(tmp_path / PATHS["train_annotations"]),
            data_prefix={"img": ""},
            metainfo={"classes": tuple(classes)},
            pipeline=[],
        )
        data = make_data(tmp_path, classes=classes, keep_empty=True)
        images = data.images("train")
        assert theirs.metainfo["classes"] == tuple(classes)
        for index in range(len(theirs)):
            info = theirs.get_data_info(index)
            loaded: Any = LoadAnnotations(with_bbox=True, with_mask=True)(info | {"ori_shape": (HEIGHT, WIDTH)})
            position = images.ids.tolist().index(info["img_id"])
            used, sample = ~loaded["gt_ignore_flags"], images[position]
            theirs_boxes = loaded["gt_bboxes"].tensor.numpy().reshape(-1, 4).clip(0, [WIDTH, HEIGHT, WIDTH, HEIGHT])
            np.testing.assert_array_equal(sample["boxes"], theirs_boxes[used])
            np.testing.assert_array_equal(sample["ignored"], theirs_boxes[~used])
            # mmdetection orders the labels as the file does, Retinue by the categories' ids.
            categories = np.array(theirs.cat_ids)[loaded["gt_bboxes_labels"][used]]
            np.testing.assert_array_equal(np.array(data.category_ids)[sample["labels"]], categories)
            np.testing.assert_array_equal(sample["masks"], loaded["gt_masks"].masks[used])


def test_an_object_without_a_mask_is_ignored_in_the_evaluation_of_masks(tmp_path):
    """The others' figures equal pycocotools' on a file in which the object is a crowd."""
    truth = truth_with(annotation(2, 12, 7, BOX, []))
    found = [
        {
            "image_id": 12,
            "category_id": 7,
            "bbox": list(box),
            "score": score,
            "segmentation": compressed(rectangle(*box)),
        }
        for box, score in ((BOX, 0.9), ((5, 5, 12, 14), 0.8))
    ]
    accuracy = evaluate("mask", found, truth, [12], [3, 7, 90])
    assert accuracy.figures["ap"] == pytest.approx(1.0)
    assert evaluate("box", found, truth, [12], [3, 7, 90]).figures["ar100"] == 1.0


def test_a_subset_of_the_classes(tmp_path):
    write(tmp_path, content(), content())
    data = make_data(tmp_path, classes=["kite", "cat"])
    assert list(data.class_names) == ["cat", "kite"]
    assert data.category_ids == [7, 90]
    assert data.images("train").ids.tolist() == [12, 30, 31]
    assert data.images("train")[0]["labels"].tolist() == [1, 0]
    assert data.images("val").ids.tolist() == [12, 5, 9, 30, 31]
    coco = COCO(tmp_path / PATHS["val_annotations"])
    ids = sorted(row["id"] for row in data.images("val").truth["annotations"])
    assert ids == sorted(coco.getAnnIds(catIds=[7, 90]))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["kit"], "data.classes has 'kit', which is no category of"),
        ("cat", "data.classes must be a list of names, like [cat], not 'cat'"),
        (["cat", "cat"], "data.classes names 'cat' twice"),
        ([], "data.classes must be a list of names"),
        (["yak"], "has no annotation of data.classes=['yak']"),
    ],
)
def test_errors_in_a_subset_of_the_classes(tmp_path, classes, message):
    truth = content() | {"categories": [*CATEGORIES, {"id": 1, "name": "yak"}]}
    write(tmp_path, truth, truth)
    with pytest.raises(ValueError) as error:
        make_data(tmp_path, classes=classes).images("train")
    assert message in str(error.value)


def test_a_byte_order_mark_is_no_error(tmp_path):
    write(tmp_path, content(), content())
    for name in (PATHS["train_annotations"], PATHS["val_annotations"]):
        (tmp_path / name).write_text(json.dumps(content()), encoding="utf-8-sig")
    assert len(make_data(tmp_path).images("train")) == 4


def test_boxes_that_are_plainly_two_corners_are_warned_of(caplog):
    boxes = [(10, 20, 30, 25), (50, 0, 80, 12), (0, 40, 9, 60), (80, 50, 90, 60)]
    corners = content() | {"annotations": [annotation(i, 12, 3, box, []) for i, box in enumerate(boxes)]}
    with caplog.at_level(logging.WARNING):
        index_coco(content(), "good")
        assert not caplog.text
        index_coco(corners, "bad")
    assert "bad: the boxes seem to be [x1, y1, x2, y2], but COCO's are [x, y, width, height]: 3 of 4" in caplog.text


def shot_objects(data):
    """Return (image, label) of each object that is trained on, and the number of ignored boxes."""
    images = data.images("train")
    samples = [images[i] for i in range(len(images))]
    objects = [(images.name(i), label) for i, sample in enumerate(samples) for label in sample["labels"].tolist()]
    return objects, sum(len(sample["ignored"]) for sample in samples)


def test_shots_are_drawn_by_the_seed_and_the_other_objects_are_ignored(tmp_path):
    boxes = [(10 * i, 5, 8, 9) for i in range(6)]
    annotations = [
        annotation(100 + 6 * k + i, image, id, box, polygon(*box))
        for k, image in enumerate((12, 5, 9, 30))
        for i, (box, id) in enumerate(zip(boxes, (7, 3, 7, 3, 7, 90), strict=True))
    ]
    write(tmp_path, content() | {"annotations": annotations})
    draws = {seed: shot_objects(make_data(tmp_path, shots=2, seed=seed))[0] for seed in range(5)}
    for objects in draws.values():
        assert sorted(label for _, label in objects) == [0, 0, 1, 1, 2, 2]
    assert draws[0] == shot_objects(make_data(tmp_path, shots=2, seed=0))[0]
    assert len({tuple(objects) for objects in draws.values()}) > 1
    # One shot is a part of two shots.
    assert set(shot_objects(make_data(tmp_path, shots=1))[0]) <= set(draws[0])
    objects, ignored = shot_objects(make_data(tmp_path, shots=5))
    assert sorted(label for _, label in objects) == [*[0] * 5, *[1] * 5, *[2] * 4]
    assert len(objects) + ignored == 6 * len({name for name, _ in objects})
    # The evaluated images have all of their objects.
    truth = make_data(tmp_path, shots=1).images("val").truth
    assert len(truth["annotations"]) == len(content()["annotations"])


def test_wrong_shots_are_refused_in_one_line(tmp_path):
    write(tmp_path, content())
    with pytest.raises(ValueError, match=r"data\.shots must be at least 1, or null for all objects, not 0$"):
        make_data(tmp_path, shots=0)
    with pytest.raises(ValueError, match=r"data\.keep_empty must be false$"):
        make_data(tmp_path, shots=1, keep_empty=True)
