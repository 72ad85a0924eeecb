"""Warnings about classes without a training image and about splits of very few images."""

import numpy as np
import pytest
from PIL import Image

from datamodules.image_folder import ImageFolder
from tests.datamodules.test_detection import CATEGORIES, content, make_data, write


def write_images(root, **counts):
    """Write `counts[<class>]` images a class."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(root / name / f"{i}.png")


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_classes_without_a_training_image_are_warned_of_once(tmp_path, caplog):
    write_images(tmp_path / "train", cat=20, dog=0, eel=20, fox=0, gnu=0, hen=0)
    write_images(tmp_path / "val", cat=20, dog=20, eel=20, fox=0, gnu=0, hen=0)
    data = ImageFolder(root=str(tmp_path))
    for split in ("val", "train", "val", "train"):
        data.images(split)
    assert warnings_of(caplog) == ["4 of 6 classes occur in no training image and cannot be learnt: dog, fox, gnu, ..."]


def test_a_split_into_nearly_nothing_is_warned_of(tmp_path, caplog):
    write_images(tmp_path, cat=12, dog=1, eel=1)
    data = ImageFolder(root=str(tmp_path))
    for split in ("train", "val", "test"):
        data.images(split)
    assert warnings_of(caplog) == [
        "the training split has only 9 images",
        "2 of 3 classes occur in no training image and cannot be learnt: dog, eel",
        "the split val has only 5 images, so each is 20 % of its figures",
    ]


def test_a_category_without_a_training_object_is_warned_of(tmp_path, caplog):
    truth = content() | {"categories": [*CATEGORIES, {"id": 0, "name": "things"}]}
    write(tmp_path, truth, truth)
    data = make_data(tmp_path)
    data.images("train")
    assert "1 of 4 classes occur in no training image and cannot be learnt: things" in warnings_of(caplog)


def test_a_label_that_is_no_class_is_refused(tmp_path):
    class Wrong(ImageFolder):
        def load(self, split):
            images = super().load(split)
            images.labels[0] = 7
            return images

    write_images(tmp_path, cat=20, dog=20)
    with pytest.raises(ValueError, match=r"the data have the label 7 in train, but 2 classes, from 0 on"):
        Wrong(root=str(tmp_path)).images("train")
