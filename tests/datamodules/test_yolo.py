"""YOLO's layout: the YAML file, boxes and polygons as pycocotools sees them, and errors in text files."""

from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from datamodules.yolo import YOLO

# pycocotools warns with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
WIDTH, HEIGHT = 310, 250
POLYGON = "1 0.1 0.2 0.5 0.2 0.6 0.8 0.2 0.6"


def write_images(folder, labels):
    """Write an image for each name, and a text file for each name whose text is not None."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for name, text in labels.items():
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 99, np.uint8)).save(folder / f"images/{name}.jpg")
        if text is not None:
            (folder / f"labels/{name}.txt").write_text(text)


@pytest.fixture
def root(tmp_path):
    """Write Roboflow's folders: two training images with boxes, one without objects; polygons for validation."""
    boxes = "0 0.5 0.5 0.2 0.4\n2 0.95 0.1 0.2 0.2\n\n0 0.5 0.5 0.2 0.4\n"
    write_images(tmp_path / "train", {"a.b": boxes, "c": "1.0 0.25 0.25 0.5 0.5", "empty": None})
    write_images(tmp_path / "valid", {"v": "1 0.5 0.5 1 1", "w": ""})
    (tmp_path / "data.yaml").write_text("train: ../train/images\nval: valid/images\nnc: 3\nnames: [cat, dog, kite]\n")
    return tmp_path


def make_data(root, **kwargs):
    return YOLO(**{"root": str(root), "image_size": [250, 310], "num_workers": 0} | kwargs)


def test_boxes_in_roboflows_folders(root):
    data = make_data(root, keep_empty=True)
    train = data.images("train")
    assert data.class_names == ["cat", "dog", "kite"]
    assert data.names("train") == ["train/images/a.b.jpg", "train/images/c.jpg", "train/images/empty.jpg"]
    # The line that occurs twice is one object; the second box is clipped to the image.
    np.testing.assert_allclose(train[0]["boxes"], [[124, 75, 186, 175], [263.5, 0, 310, 50]])
    assert train[0]["labels"].tolist() == [0, 2]
    np.testing.assert_allclose(train[1]["boxes"], [[0, 0, 155, 125]])
    assert len(train[2]["boxes"]) == 0
    assert not data.has_masks
    assert len(make_data(root).images("train")) == 2
    assert data.names("test") == data.names("val") == ["valid/images/v.jpg", "valid/images/w.jpg"]
    subset = make_data(root, classes=["kite", "dog"])
    assert subset.class_names == ["dog", "kite"]
    assert subset.images("train")[0]["labels"].tolist() == [1]


def test_polygons_are_masks(root):
    for split in ("train", "valid"):
        for path in (root / split / "labels").iterdir():
            path.write_text(f"{POLYGON}\n0 0.0 0.0 1 0 0 1")
    data = make_data(root)
    sample = data.images("train")[0]
    points = np.array(POLYGON.split()[1:], float).reshape(-1, 2) * (WIDTH, HEIGHT)
    polygons: Any = [points.ravel().tolist(), [0, 0, WIDTH, 0, 0, HEIGHT]]
    encoded: Any = rle.frPyObjects(polygons, HEIGHT, WIDTH)
    np.testing.assert_array_equal(sample["masks"], rle.decode(encoded).transpose(2, 0, 1))
    assert sample["labels"].tolist() == [1, 0]
    np.testing.assert_allclose(sample["boxes"][0], [*points.min(0), *points.max(0)])
    truth = data.images("val").truth["annotations"]
    assert truth[0]["area"] == pytest.approx(rle.area(encoded[0]), rel=0.01)
    np.testing.assert_allclose(truth[0]["bbox"], rle.toBbox(encoded[0]), atol=1)


def test_keypoints_are_left_out(root):
    (root / "data.yaml").write_text((root / "data.yaml").read_text() + "kpt_shape: [2, 2]\n")
    (root / "train/labels/c.txt").write_text("1 0.25 0.25 0.5 0.5 0.1 0.1 0.2 0.2")
    np.testing.assert_allclose(make_data(root).images("train")[1]["boxes"], [[0, 0, 155, 125]])


def test_lists_of_images_and_names_by_number(root):
    """COCO in Ultralytics' layout lists the images in text files, and its classes are a mapping."""
    (root / "lists").mkdir()
    (root / "lists/train.txt").write_text("../train/images/c.jpg\n./../train/images/a.b.jpg\n", encoding="utf-8-sig")
    content = "path: nowhere\ntrain: [lists/train.txt]\nval: valid/images\ntest: valid/images\nnames: "
    content += "{2: kite, 0: cat, 1: dog}"
    (root / "other.yaml").write_text(content)
    data = make_data(root, config="other.yaml")
    assert data.names("train") == ["train/images/c.jpg", "train/images/a.b.jpg"]
    assert list(data.splits) == ["train", "val", "test"]
    assert data.class_names == ["cat", "dog", "kite"]
    (root / "other.yaml").write_text(content.replace("nowhere", str(root / "lists")).replace("lists/train", "train"))
    with pytest.raises(ValueError, match=r"val is 'valid/images', but there is no .*lists/valid/images"):
        make_data(root, config="other.yaml").images("val")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2", "c.txt:2 is '0 0.5 0.5 0.2': expected `class x y width height` or `class x1 y1 x2 y2 x3 y3"),
        ("0 0.5 0.5 0.2 0.1 0.7", "c.txt:2 is"),
        ("cat 0.5 0.5 0.2 0.1", "c.txt:2 is"),
        ("0 0.5 0.5 0.2 nan", "c.txt:2 is"),
        ("3 0.5 0.5 0.2 0.1", "c.txt:2 has the class 3: the data have 3, 0 to 2"),
        ("0 100 50 20 30", "c.txt:2 has the coordinate 100: expected shares of the image, 0 to 1"),
        ("0 -0.5 0.5 0.2 0.3", "c.txt:2 has the coordinate -0.5"),
    ],
)
def test_errors_in_a_text_file_name_the_line(root, line, message):
    (root / "train/labels/c.txt").write_text(f"0 0.5 0.5 0.2 0.4\n{line}\n")
    with pytest.raises(ValueError) as error:
        make_data(root).images("train")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def change_yaml(text):
    return lambda root: (root / "data.yaml").write_text(text)


def remove_labels(root):
    (root / "valid/labels/v.txt").unlink()


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"config": "coco.yaml"}, "data.config: {root}/coco.yaml cannot be read: No such file or directory"),
        (None, {"classes": ["dgo"]}, "data.classes has 'dgo', which is no category of {root}/data.yaml (val). Did you"),
        (change_yaml("a: [b"), {}, "data.yaml is not a YAML file: while parsing"),
        (change_yaml("!!python/object/apply:os.getcwd []"), {}, "data.yaml is not a YAML file: could not determine"),
        (change_yaml("train: a"), {}, "data.yaml has no `names`"),
        (change_yaml("names: 3\nval: valid/images"), {}, "`names` must be a list of names or a mapping"),
        (change_yaml("names: [a]\ntrain: train/images"), {}, "data.yaml has no 'val': expected a folder or a list"),
        (change_yaml("names: [a]\nval: valid/labels"), {}, "val has no images in {root}/valid/labels"),
        (change_yaml("names: [a]\nval: vlaid"), {}, "data.yaml: val is 'vlaid', but there is no {root}/vlaid"),
        (remove_labels, {}, "data.yaml (val): none of 2 images has objects; looked for {root}/valid/labels/v.txt"),
        (lambda root: (root / "valid/images/v.jpg").write_bytes(b"no"), {}, "images/v.jpg cannot be read: cannot"),
    ],
)
def test_errors_in_a_data_set_are_one_line(root, change, arguments, message):
    if change:
        change(root)
    with pytest.raises(ValueError) as error:
        make_data(root, **arguments).images("val")
    assert message.format(root=root) in str(error.value)
    assert "\n" not in str(error.value)
