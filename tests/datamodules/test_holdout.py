"""Images that are held out of the training split."""

import numpy as np
import pytest

from datamodules.digits import Digits


def names(data, split):
    return set(data.names(split))


def test_the_held_out_images_are_training_images_of_every_class_and_no_longer_trained_on():
    whole = Digits(image_size=32, batch_size=8)
    data = Digits(image_size=32, batch_size=8, holdout=5)
    train, held = names(data, "train"), names(data, "val")
    assert not train & held and train | held == names(whole, "train")
    assert np.bincount(data.images("val").labels).tolist() == [5] * 10
    assert names(data, "test") == names(whole, "test")
    assert {
        name for batch in data.train_dataloader() for name in np.array(data.names("train"))[batch["index"]]
    } <= train
    image, label = data.images("val")[7]["image"], data.images("val")[7]["label"]
    position = whole.names("train").index(data.images("val").name(7))
    assert (image == whole.images("train").image(position)).all() and label == whole.images("train").labels[position]
    assert names(Digits(image_size=32, batch_size=8, holdout=5, seed=3), "val") == held


def test_a_class_keeps_training_images():
    with pytest.raises(
        ValueError, match=r"task\.holdout=200 leaves no training image of the smallest class, which has"
    ):
        Digits(image_size=32, batch_size=8, holdout=200).images("val")
