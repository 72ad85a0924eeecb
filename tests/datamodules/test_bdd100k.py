"""BDD100K: files of 2018 and of 2020, crowds, lanes that are left out, and attributes as labels."""

import json

import numpy as np
import pytest
from PIL import Image

from datamodules.bdd100k import BDD100K, BDD100KAttributes

PATHS = {"train_labels": "train.json", "train_images": "train", "val_labels": "val.json", "val_images": "val"}


def label(category, x1, y1, x2, y2, **attributes):
    return {"category": category, "attributes": attributes, "box2d": {"x1": x1, "y1": y1, "x2": x2, "y2": y2}}


LANE = {"category": "lane", "attributes": {"laneStyle": "solid"}, "poly2d": [{"vertices": [[0, 0], [9, 9]]}]}
FRAMES = [
    {
        "name": "a.jpg",
        "attributes": {"weather": "clear", "scene": "city street", "timeofday": "night"},
        "labels": [
            label("person", 10, 20, 29.5, 39), LANE, label("motor", 0, 0, 9, 9, occluded=True),
            label("other vehicle", 40, 10, 49, 19), label("traffic sign", 50, 5, 59, 9),
            label("car", 1, 1, 5, 5, crowd=True),
        ],
    },
    {
        "name": "b.jpg",
        "attributes": {"weather": "snowy", "scene": "undefined", "timeofday": "dawn/dusk"},
        "labels": None,
    },
]  # fmt: skip


@pytest.fixture
def root(tmp_path):
    for split, content in (("train", FRAMES), ("val", {"frames": FRAMES, "config": {}})):
        (tmp_path / split).mkdir()
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
        for frame in FRAMES:
            Image.fromarray(np.full((50, 60, 3), 99, np.uint8)).save(tmp_path / split / frame["name"])
    return tmp_path


def make_data(root, **kwargs):
    return BDD100K(**{"root": str(root), "image_size": [50, 60], "num_workers": 0} | PATHS | kwargs)


def test_boxes(root):
    data = make_data(root, keep_empty=True)
    sample = data.images("train")[0]
    assert [data.class_names[label] for label in sample["labels"]] == ["pedestrian", "motorcycle", "traffic sign"]
    # The boxes include the pixels of their sides.
    assert sample["boxes"].tolist() == [[10, 20, 30.5, 40], [0, 0, 10, 10], [50, 5, 60, 10]]
    assert sample["ignored"].tolist() == [[40, 10, 50, 20], [1, 1, 6, 6]]
    assert len(data.images("train")[1]["boxes"]) == 0
    truth = data.images("val").truth
    assert [(row["category_id"], row["iscrowd"]) for row in truth["annotations"]] == [
        (1, 0), (7, 0), (3, 1), (10, 0), (3, 1),
    ]  # fmt: skip
    assert data.category_ids == list(range(1, 11))
    assert make_data(root, classes=["traffic sign", "car"]).class_names == ["car", "traffic sign"]


@pytest.mark.parametrize(
    ("attribute", "names", "labels"),
    [("weather", ["a.jpg", "b.jpg"], [0, 5]), ("scene", ["a.jpg"], [0]), ("timeofday", ["a.jpg", "b.jpg"], [2, 0])],
)
def test_attributes(root, attribute, names, labels):
    data = BDD100KAttributes(root=str(root), attribute=attribute, image_size=32, num_workers=0, **PATHS)
    assert data.names("train") == names
    assert data.images("train").labels.tolist() == labels
    assert data.images("val")[0]["image"].shape == (50, 60, 3)
    assert data.num_classes == (3 if attribute == "timeofday" else 6)


def change_frame(**changes):
    return json.dumps([FRAMES[0] | changes])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "val.json is not a JSON file"),
        ("[]", "val.json is not a file of BDD100K: expected a list of images, each with a name"),
        (change_frame(labels=[label("cra", 1, 1, 9, 9)]), "a.jpg has a 'cra', which is no class of BDD100K. Did you"),
        (change_frame(labels=[label("car", 9, 1, 1, 9)]), "a.jpg has the box2d {{'x1': 9"),
        (change_frame(labels=[{"category": "car", "box2d": [1, 2]}]), "a.jpg has the box2d [1, 2]: expected numbers"),
        (change_frame(name="z.jpg"), "the size of {root}/val/z.jpg cannot be read"),
    ],
)
def test_errors_in_labels_are_one_line(root, content, message):
    (root / "val.json").write_text(content)
    with pytest.raises(ValueError) as error:
        make_data(root).images("val")
    assert message.format(root=root) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        ({"attribute": "whether"}, None, "data.attribute must be weather, scene, timeofday, not 'whether'. Did you"),
        ({"val_labels": "v.json"}, None, "v.json cannot be read: No such file or directory"),
        ({}, change_frame(attributes={"weather": "clera"}), "a.jpg has the weather 'clera', which is unknown. Did you"),
        ({}, change_frame(attributes=None), "val.json: no image has the attribute weather"),
        ({}, change_frame(name="z.jpg"), "1 of 1 images of {root}/val.json are missing, like {root}/val/z.jpg"),
    ],
)  # fmt: skip
def test_errors_in_attributes_are_one_line(root, arguments, content, message):
    if content:
        (root / "val.json").write_text(content)
    with pytest.raises(ValueError) as error:
        BDD100KAttributes(**{"root": str(root), "num_workers": 0} | PATHS | arguments).images("val")
    assert message.format(root=root) in str(error.value)
