"""VOC's folders and XML files: image sets of several years, classes, difficult objects, pixels counted from 1."""

import os
import re

import numpy as np
import pytest
from PIL import Image

from datamodules.voc import VOC

SIDES = ("xmin", "ymin", "xmax", "ymax")


def xml(objects, width=40, height=30):
    rows = [
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
        + "".join(f"<{side}>{value}</{side}>" for side, value in zip(SIDES, box, strict=True))
        + "</bndbox></object>"
        for name, difficult, box in objects
    ]
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{size}{''.join(rows)}</annotation>"


def write_year(folder, sets, objects):
    for name in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    for name, stems in sets.items():
        (folder / f"ImageSets/Main/{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))
    for stem, rows in objects.items():
        (folder / f"Annotations/{stem}.xml").write_text(xml(rows))
        Image.fromarray(np.full((30, 40, 3), 99, np.uint8)).save(folder / f"JPEGImages/{stem}.jpg")


@pytest.fixture
def root(tmp_path):
    first = {"000001": [("dog", 0, (1, 1, 40, 30)), ("cat", 1, (5, 6, 20, 16))], "000002": [("dog", 0, (3, 3, 9, 8))]}
    write_year(tmp_path / "VOC2007", {"trainval": ["000001"], "test": ["000002 -1"]}, first)
    second = {"2008_000003": [("person", 0, (2.5, 1, 12.5, 10))], "2008_000004": [], "2008_000005": []}
    write_year(tmp_path / "VOC2012", {"trainval": ["2008_000004", "2008_000003"], "empty": [], "gap": ["5"]}, second)
    return tmp_path


def make_data(root, **kwargs):
    usual = {"train": ["VOC2007/trainval", "VOC2012/trainval"], "val": ["VOC2007/test"], "num_workers": 0}
    return VOC(**{"root": str(root), "image_size": [30, 40]} | usual | kwargs)


def test_years_become_one_split(root):
    data = make_data(root)
    train = data.images("train")
    assert list(data.class_names) == ["cat", "dog", "person"]
    assert not data.has_masks
    assert data.names("train") == ["VOC2007/JPEGImages/000001.jpg", "VOC2012/JPEGImages/2008_000003.jpg"]
    # The image without objects is not trained on.
    assert train.ids.tolist() == [0, 2]
    sample = train[0]
    assert sample["boxes"].tolist() == [[0, 0, 40, 30]]
    assert sample["labels"].tolist() == [1]
    # The difficult object is ignored.
    assert sample["ignored"].tolist() == [[4, 5, 20, 16]]
    assert train[1]["boxes"].tolist() == [[1.5, 0, 12.5, 10]]
    assert train[1]["labels"].tolist() == [2]
    assert data.names("test") == data.names("val") == ["VOC2007/JPEGImages/000002.jpg"]
    truth = data.images("val").truth
    assert [category["name"] for category in truth["categories"]] == ["cat", "dog", "person"]
    assert truth["annotations"][0]["bbox"] == [2, 2, 7, 6]
    assert make_data(root, keep_empty=True).names("train")[1] == "VOC2012/JPEGImages/2008_000004.jpg"
    crowds = [row["iscrowd"] for row in make_data(root, val=["VOC2007/trainval"]).images("val").truth["annotations"]]
    assert crowds == [0, 1]


def test_labels_follow_the_order_of_the_argument_classes(root):
    data = make_data(root, classes=["person", "dog", "cat"])
    assert data.images("train")[0]["labels"].tolist() == [1]
    with pytest.raises(ValueError, match=r"data.classes has 'dgo', which no training image has. Did you mean 'dog'\?"):
        make_data(root, classes=["person", "dgo"]).images("train")


def test_objects_of_other_classes_are_left_out(root):
    data = make_data(root, classes=["person", "dog"], keep_empty=True)
    assert data.class_names == ["person", "dog"]
    train = data.images("train")
    assert [train[index]["labels"].tolist() for index in range(3)] == [[1], [], [0]]
    assert train[0]["ignored"].shape == (0, 4)
    # A net of more classes than the images have can be evaluated.
    assert make_data(root, classes=["bicycle", "cat", "dog", "person"]).images("val").index.labels.tolist() == [2]


def test_image_names_with_spaces_and_a_byte_order_mark(tmp_path):
    names = ["a photo 1", "a photo 2", "3"]
    write_year(tmp_path, {}, {name: [("dog", 0, (1, 1, 9, 9))] for name in names})
    for name in ("train", "val"):
        (tmp_path / f"ImageSets/Main/{name}.txt").write_text("a photo 1\na photo 2  -1\r\n3  1\n", encoding="utf-8-sig")
    expected = [f"JPEGImages/{name}.jpg" for name in names]
    assert make_data(tmp_path, train=["train"], val=["val"]).names("val") == expected


@pytest.mark.parametrize("change", [(r"<size>.*</size>", ""), ("<width>40", "<width>0"), ("<height>30", "<height>")])
def test_the_size_of_an_annotation_without_one_is_the_images(root, change):
    path = root / "VOC2007/Annotations/000002.xml"
    path.write_text(re.sub(change[0], change[1], path.read_text()))
    assert make_data(root).images("val").index.sizes.tolist() == [[30, 40]]
    (root / "VOC2007/JPEGImages/000002.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"000002.xml has no size, and .*000002.jpg cannot be read: cannot identify"):
        make_data(root).images("val")


def test_unspecified_difficulty_is_none(root):
    path = root / "VOC2007/Annotations/000002.xml"
    path.write_text(path.read_text().replace("<difficult>0", "<difficult>Unspecified"))
    assert not make_data(root).images("val").index.crowd.any()


def replace_xml(text):
    return lambda root: (root / "VOC2007/Annotations/000002.xml").write_text(text)


def fifo_for_xml(root):
    (root / "VOC2007/Annotations/000002.xml").unlink()
    os.mkfifo(root / "VOC2007/Annotations/000002.xml")


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"val": ["VOC2007/tset"]}, "no image set is called 'tset' in"),
        (None, {"val": ["VOC2009/test"]}, "VOC2009"),
        (None, {"val": "test"}, "data.val must be a list of image sets, like [test], not 'test'"),
        (None, {"classes": "cat"}, "data.classes must be a list of names, like [cat], not 'cat'"),
        (None, {"val": ["VOC2012/empty"]}, "empty.txt is empty"),
        (None, {"val": ["VOC2012/gap"]}, "5 of"),
        (lambda root: (root / "VOC2007/Annotations/000002.xml").unlink(), {}, "000002.xml is missing"),
        (fifo_for_xml, {}, "000002.xml cannot be read: it is no regular file"),
        (lambda root: (root / "VOC2007/JPEGImages/000002.jpg").unlink(), {}, "000002 of"),
        (replace_xml("<annotation>"), {}, "000002.xml is not an annotation like VOC's"),
        (replace_xml("<annotation><object/></annotation>"), {}, "000002.xml is not an annotation like VOC's"),
        (replace_xml(xml([("dgo", 0, (1, 1, 5, 5))])), {}, "000002.xml has a 'dgo', which is none of the classes"),
        (replace_xml(xml([("dog", 0, (91, 1, 95, 5))])), {}, "none of the 1 boxes"),
        (replace_xml(xml([])), {}, "annotations is empty"),
    ],
)
def test_errors_in_a_data_set_are_one_line(root, change, arguments, message):
    if change:
        change(root)
    with pytest.raises(ValueError) as error:
        make_data(root, **arguments).images("val")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
