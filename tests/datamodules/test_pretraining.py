"""Views for pretraining follow from (seed, epoch, image) alone; folders without classes; images of each class."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.any_folder import AnyFolder
from datamodules.digits import Digits
from datamodules.loader import TrainLoader
from datamodules.pretraining import PretrainingData
from datamodules.sampler import TrainSampler
from datamodules.views import Mask

VIEWS = {
    "large": {"number": 2, "mask": {"ratio": 0.3, "patch": 4}},
    "small": {"number": 3, "size": 16, "augment": {"scale": [0.1, 0.4]}},
}


def digits(**arguments):
    source = Digits(image_size=32, in_chans=3, num_workers=0, batch_size=6, seed=1, flip=False, **arguments)
    return PretrainingData(source, VIEWS, {"scale": [0.5, 1.0], "hflip": 0.5}, lambda side: side // 8)


def by_image(batch):
    """Return the arrays of all views of each image, by the image's position."""
    images = {}
    for i, index in enumerate(batch["index"].tolist()):
        images[index] = [np.asarray(value[i]) for view in batch["views"] for _, value in sorted(view.items())]
    return images


def same(one, other):
    return one.keys() == other.keys() and all(
        np.array_equal(a, b) for key in one for a, b in zip(one[key], other[key], strict=True)
    )


def train_views(data, rank, world_size, epoch, steps=2):
    fetch, _ = data._source("train")
    sampler = TrainSampler(len(data.images("train")), 6 // world_size, seed=data.seed, rank=rank, world_size=world_size)
    loader = TrainLoader(fetch, sampler)
    loader.set_epoch(epoch)
    batches = iter(loader)
    return {key: value for _ in range(steps) for key, value in by_image(next(batches)).items()}


def test_views_follow_from_seed_epoch_and_image():
    one = train_views(digits(), 0, 1, epoch=1)
    two = train_views(digits(), 0, 2, epoch=1) | train_views(digits(), 1, 2, epoch=1)
    assert len(one) == 12 and same(one, {key: two[key] for key in one})
    image, *_ = train_views(digits(), 0, 1, epoch=1, steps=1)
    assert not np.array_equal(one[image][0], one[image][2]), "two views of an image are equal"
    other = digits().train_dataloader()
    other.set_epoch(2)
    later = {key: value for batch in other for key, value in by_image(batch).items()}
    assert not np.array_equal(one[image][0], later[image][0]), "two epochs have equal views"


def test_shapes_of_the_views():
    data = digits()
    assert [tuple(shape) for shape in data.train_transform.shapes] == [((32, 32), (8, 8), 20)] * 2 + [
        ((16, 16), (0, 0), 0)
    ] * 3
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert [tuple(view["image"].shape) for view in batch["views"]] == [(6, 3, 32, 32)] * 2 + [(6, 3, 16, 16)] * 3
    assert [view["mask"].sum((1, 2)).tolist() for view in batch["views"][:2]] == [[20] * 6] * 2
    assert batch["image"].shape == (6, 3, 32, 32) and batch["image"].dtype == torch.float32
    again = data.on_after_batch_transfer(next(iter(digits().val_dataloader())), 0)
    assert same(by_image(batch), by_image(again))


def test_digits_are_not_mirrored():
    source = Digits(image_size=32, in_chans=3, num_workers=0, batch_size=6, flip=False)
    data = PretrainingData(source, {"image": {"augment": {"hflip": 1.0}}}, {"hflip": 1.0}, lambda side: 4)
    assert data.train_transform.transforms[0].augment.hflip == 0


def test_a_mask_that_does_not_divide_the_image_is_refused():
    with pytest.raises(ValueError, match="a mask's patch of 5 pixels does not divide images of 32 x 32 pixels"):
        Mask(ratio=0.5, patch=5).grid((32, 32), lambda side: 4)


def test_the_bank_has_the_chosen_number_of_training_images_at_equal_distances():
    data = digits()
    batches = list(data.bank_dataloader(100))
    index = torch.cat([batch["index"] for batch in batches])
    assert index.tolist() == list(range(100)) and "views" not in batches[0]
    labels = torch.cat([batch["label"] for batch in batches])
    places = np.linspace(0, 1254, 100).round().astype(int)
    assert labels.tolist() == data.images("train").labels[places].tolist()


def write_images(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), i, np.uint8)).save(root / name)


def folder(root):
    return AnyFolder(root=str(root), image_size=16, in_chans=3, num_workers=0, batch_size=2)


def test_a_folder_without_classes_is_read_at_any_depth(tmp_path):
    write_images(tmp_path, "z.png", *(f"a/{i % 3}/b/{i}.png" for i in range(9)))
    data = folder(tmp_path)
    assert data.class_names == () and data.splits == ("train", "val")
    assert data.names("val") == ["a/0/b/0.png", "a/1/b/7.png"]
    assert len(data.names("train")) == 8 and not set(data.names("train")) & set(data.names("val"))
    assert set(data.images("train").labels) == {-1}


def test_folders_of_splits_without_classes(tmp_path):
    write_images(tmp_path, "train/a.png", "train/b/c.png", "val/d.png", "val/e.png", "test/f.png")
    data = folder(tmp_path)
    assert data.class_names == () and set(data.splits) == {"train", "val", "test"}
    assert [data.names(split) for split in ("train", "val", "test")] == [
        ["a.png", "b/c.png"], ["d.png", "e.png"], ["f.png"],
    ]  # fmt: skip


def test_class_folders_give_labels(tmp_path):
    write_images(tmp_path, *(f"{name}/deep/{i}.png" for name in ("cat", "dog") for i in range(5)))
    data = folder(tmp_path)
    assert data.class_names == ["cat", "dog"]
    assert data.images("val").labels.tolist() == [0, 1]


def test_shots_are_images_of_each_class_drawn_by_the_seed():
    drawn = {}
    for seed in (0, 1):
        for shots in (2, 5):
            data = Digits(image_size=32, in_chans=3, num_workers=0, batch_size=2, seed=seed, shots=shots)
            assert np.bincount(data.images("train").labels).tolist() == [shots] * 10
            assert len(data.images("val")) == 185
            drawn[seed, shots] = set(data.names("train"))
    assert drawn[0, 2] < drawn[0, 5] and drawn[0, 5] != drawn[1, 5]
    few: Any = data.images("train")
    whole = Digits(image_size=32, in_chans=3, num_workers=0, batch_size=2).images("train")
    assert np.array_equal(few.image(0), whole.image(few.positions[0]))
    with pytest.raises(ValueError, match=r"data\.shots must be at least 1"):
        Digits(image_size=32, in_chans=3, num_workers=0, batch_size=2, shots=0)
