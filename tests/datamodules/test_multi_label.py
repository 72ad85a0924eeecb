"""CSV files of multi-label images, in both forms, and their errors."""

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.batch import BatchTransform
from datamodules.multi_label import MultiLabelCSV
from datamodules.transforms import Augment

NAMED = "image,labels\na.png,cat|dog\nb.png,\nc.png, cow \nd.png,dog|cat\ne.png,cow\n"
COLUMNS = "image,cat,cow,dog\na.png,1,0,1\nb.png,0,-1,\nc.png,0,1,0\nd.png,1.0,0,1\ne.png,0,1,0\n"
LABELS = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 1], [0, 1, 0]]


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate("abcde"):
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def make(folder, text, **arguments):
    (folder / "train.csv").write_text(text, encoding="utf-8")
    return MultiLabelCSV(
        root=str(folder), image_size=8, batch_size=2, num_workers=0, **({"train": "train.csv"} | arguments)
    )


@pytest.mark.parametrize("text", [NAMED, COLUMNS, NAMED.replace("|", "; ")])
def test_both_forms_give_the_same_labels(folder, text):
    separator = "semicolon" if ";" in text else "|"
    data = make(folder, text, val="train.csv", separator=separator)
    assert list(data.class_names) == ["cat", "cow", "dog"] and list(data.splits) == ["train", "val"]
    for split in ("train", "val", "test"):
        images = data.images(split)
        assert [images.name(i) for i in range(5)] == [f"{name}.png" for name in "abcde"]
        np.testing.assert_array_equal(images.labels, LABELS)
    batches = list(data.val_dataloader())
    assert batches[0]["label"].tolist() == LABELS[:2] and batches[0]["label"].dtype == torch.int64


def test_some_classes_a_suffix_other_columns_and_every_fifth_image_for_validation(folder):
    text = "id,age,file,what\n7,3,a,cat dog\n8,,b,\n9,4,c,cow\n1,1,d,dog\n2,2,e,cow\n"
    data = make(
        folder, text, suffix=".png", image_column="file", label_column="what", separator="space", classes=["dog", "cat"]
    )
    assert data.images("train").labels.tolist() == [[0, 0], [0, 0], [1, 0], [0, 0]]
    assert data.images("val").labels.tolist() == [[1, 1]] and data.images("val").name(0) == "a.png"
    image, label = data.image_classes(data.images("train"))
    assert (image.tolist(), label.tolist()) == ([2], [0])


def test_padding_has_no_class(folder):
    assert make(folder, NAMED).images("train").blank["label"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("text", "arguments", "says"),
    [
        (NAMED, {"train": None}, "data.train=FILE"),
        (NAMED, {"train": "tran.csv"}, "tran.csv cannot be read: No such file"),
        (NAMED, {"label_column": "label"}, "data.label_column=label: .* has no such column. Did you mean 'labels'"),
        (NAMED, {"classes": ["cot"]}, "'cot' is no class of .*train.csv. Did you mean 'co?[wat]+'"),
        (NAMED, {"classes": "cat"}, "data.classes must be a list of different names, not 'cat'"),
        (NAMED + "f.png,cat\n", {}, "1 of 6 images of .* are missing, like .*f.png"),
        (NAMED + "a.png\n", {}, "row 6: expected 2 cells"),
        (COLUMNS.replace("c.png,0,1", "c.png,0,2"), {}, "row 3, column 'cow': expected 0 or 1, not '2'"),
        ("image,labels\n", {}, "expected a header and rows"),
        ("image,labels\na.png,\n", {}, "no image has a class"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(folder, text, arguments, says):
    with pytest.raises(ValueError, match=says) as error:
        make(folder, text, **({"val": "train.csv"} | arguments)).images("train")
    assert "\n" not in str(error.value)


def test_a_class_that_is_only_in_validation_is_refused(folder):
    (folder / "val.csv").write_text("image,labels\na.png,cat|owl\n")
    with pytest.raises(ValueError, match=r"row 1: the class 'owl' is not in train\.csv"):
        make(folder, NAMED, val="val.csv").images("val")


def test_mixed_labels_are_those_of_both_images():
    label = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0]])
    image = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 4, 4) * 100
    image = image.contiguous(memory_format=torch.channels_last)
    transform = BatchTransform((0.0,) * 3, (1.0,) * 3, 3, Augment.from_config({"mixup": 0.8}))
    batch = transform({"image": image, "label": label, "seed": 5})
    share = 1 - batch["image"][0, 0, 0, 0].item() / (200 / 255)
    assert 0 < share < 1
    torch.testing.assert_close(batch["target"], share * label + (1 - share) * label.flip(0), atol=1e-5, rtol=0)
