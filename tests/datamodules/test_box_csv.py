"""CSV files of boxes: headers of several programs, columns without a header, images without boxes, and errors."""

import numpy as np
import pytest
from PIL import Image

from datamodules.box_csv import BoxCSV

# Two boxes in a.png, one in b.png, none in c.png, as four programs write them.
TABLES = {
    "keras-retinanet": "a.png,1,2,30,40,dog\na.png,5,6,7,8.5,cat\nb.png,0,0,60,50,dog\nc.png,,,,,\n",
    "deepforest": "image_path,xmin,ymin,xmax,ymax,label\na.png,1,2,30,40,dog\na.png,5,6,7,8.5,cat\n"
    "b.png,0,0,60,50,dog\nc.png,0,0,0,0,dog\n",
    "tensorflow": "filename,width,height,class,xmin,ymin,xmax,ymax\na.png,60,50,dog,1,2,30,40\n"
    "a.png,60,50,cat,5,6,7,8.5\nb.png,60,50,dog,0,0,60,50\nc.png,60,50,,,,,\n",
    "quoted": '\ufeff"X1", "Y1", "X2", "Y2", "Label", "Image"\r\n1,2,30,40,"dog","a.png"\r\n5,6,7,8.5,cat,a.png\r\n\r\n'
    "0,0,60,50,dog,b.png\r\n,,,,,c.png\r\n",
}
COLUMNS = ["image", "x1", "y1", "x2", "y2", "class"]


def write(root, train, val=TABLES["deepforest"]):
    (root / "photos").mkdir(exist_ok=True)
    for name in "abc":
        Image.fromarray(np.full((50, 60, 3), 99, np.uint8)).save(root / f"photos/{name}.png")
    (root / "train.csv").write_text(train, newline="")
    (root / "val.csv").write_text(val)
    return root


def make_data(root, **kwargs):
    usual = {"images": "photos", "train": "train.csv", "val": "val.csv", "image_size": [50, 60], "num_workers": 0}
    return BoxCSV(**{"root": str(root)} | usual | kwargs)


def check(data):
    train = data.images("train")
    assert list(data.class_names) == ["cat", "dog"]
    assert data.names("train") == ["a.png", "b.png", "c.png"]
    assert train[0]["boxes"].tolist() == [[1, 2, 30, 40], [5, 6, 7, 8.5]]
    assert train[0]["labels"].tolist() == [1, 0]
    assert train[1]["boxes"].tolist() == [[0, 0, 60, 50]]
    assert train[2]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("program", TABLES)
def test_headers(tmp_path, program):
    check(make_data(write(tmp_path, TABLES[program]), keep_empty=True))


def test_given_columns(tmp_path):
    """SKU-110K has no header, and the image's size in further columns; a header in another language is skipped."""
    rows = "a.png,1,2,30,40,dog,60,50\na.png,5,6,7,8.5,cat,60,50\nb.png,0,0,60,50,dog,60,50\nc.png,,,,,,60,50\n"
    columns = [*COLUMNS, "width", "height"]
    header = "Bild,links,oben,rechts,unten,Klasse,b,h\n"
    for text in (rows, header + rows):
        check(make_data(write(tmp_path, text, text), columns=columns, keep_empty=True))
    with pytest.raises(ValueError, match=r"train.csv has no column image or .* in its header Bild,links"):
        make_data(write(tmp_path, header + rows)).images("train")


def test_classes_and_splits(tmp_path):
    data = make_data(write(tmp_path, TABLES["deepforest"]), classes=["dog"])
    assert data.images("train")[0]["labels"].tolist() == [0]
    assert data.names("test") == data.names("val")
    assert data.images("val").truth["annotations"][0]["bbox"] == [1, 2, 29, 38]
    (tmp_path / "test.csv").write_text("b.png,0,0,1,1,dog\n")
    assert make_data(tmp_path, test="test.csv").names("test") == ["b.png"]


@pytest.mark.parametrize(
    ("train", "arguments", "message"),
    [
        ("", {}, "train.csv is empty"),
        ("a.png,1,2,30,40", {}, "train.csv has no column image or"),
        ("a.png,1,2,30,40,dog\nb.png,1,2", {}, "train.csv:2 has 3 values: expected at least 6"),
        ("a.png,1,2,30,40,dog\nb.png,1,x,3,4,dog", {}, "train.csv:2 has the box 1, x, 3, 4: expected x1, y1, x2, y2"),
        ("a.png,1,2,30,40,dog\nb.png,1,,3,4,dog", {}, "train.csv:2 has the box 1, , 3, 4: expected x1, y1, x2, y2"),
        ("a.png,1,2,30,40,dog\nb.png,5,1,3,4,dog", {}, "train.csv:2 has the box [5.0, 1.0, 3.0, 4.0]: expected x1 <"),
        ("a.png,1,2,30,40,dog\nb.png,1,1,3,4,", {}, "train.csv:2 has a box without a class"),
        ("a.png,1,2,30,40,dog\nd.png,1,1,3,4,cat", {}, "the size of {root}/photos/d.png cannot be read: [Errno 2]"),
        ("a.png,1,2,30,40,dog", {}, "val.csv has a 'cat', which is none of the classes: dog"),
        (TABLES["deepforest"], {"classes": ["dgo"]}, "data.classes has 'dgo', which no training image has. Did you"),
        (TABLES["deepforest"], {"classes": "dog"}, "data.classes must be a list of names, like [dog], not 'dog'"),
        (TABLES["deepforest"], {"columns": ["a"]}, "data.columns must be a list with image, x1, y1, x2, y2, class"),
        (TABLES["deepforest"], {"val": "v.csv"}, "data.val: there is no file {root}/v.csv"),
        (TABLES["deepforest"], {"train": None}, "data.train is needed"),
    ],
)
def test_errors_are_one_line(tmp_path, train, arguments, message):
    write(tmp_path, train)
    with pytest.raises(ValueError) as error:
        data = make_data(tmp_path, **arguments)
        data.images("val")
        data.images("train")
    assert message.format(root=tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
