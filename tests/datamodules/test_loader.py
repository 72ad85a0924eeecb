"""Batches do not depend on workers; loading leaves global generators alone; broken images are named and limited."""

import logging
import pickle
import random

import numpy as np
import pytest
import torch

from datamodules.decode import BrokenImage
from datamodules.imagenet import ImageNet
from datamodules.images import ArrayImages
from datamodules.loader import BatchFetcher, Loader, TrainLoader
from datamodules.sampler import EvalSampler, TrainSampler
from tests.imagenet_folder import make_imagenet_folder

AUGMENT = {
    "scale": (0.2, 1.0),
    "interpolation": "random",
    "hflip": 0.5,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.3,
    "repeats": 2,
    "erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_imagenet_folder(tmp_path_factory.mktemp("imagenet"))


def make_data(root, **kwargs):
    return ImageNet(
        **{"root": str(root), "image_size": 24, "batch_size": 5, "broken_limit": 0.1, "augment": AUGMENT} | kwargs
    )


def epochs(data, count=2):
    loader, batches = data.train_dataloader(), []
    for epoch in range(count):
        loader.set_epoch(epoch)
        batches += [data.on_after_batch_transfer(batch, 0) for batch in loader]
    return batches


def equal_values(a, b):
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(equal_values, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def equal_batches(a, b):
    return a.keys() == b.keys() and all(equal_values(a[key], b[key]) for key in a)


def test_batches_do_not_depend_on_workers(root):
    batches, with_workers = epochs(make_data(root, num_workers=0)), epochs(make_data(root, num_workers=2))
    assert len(batches) == 14
    assert all(equal_batches(a, b) for a, b in zip(batches, with_workers, strict=True))
    batch = batches[0]
    assert batch["image"].shape == (5, 3, 24, 24)
    assert batch["image"].dtype == batch["target"].dtype == torch.float32
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    assert isinstance(batch["seed"], int)
    # The second epoch differs from the first one.
    assert not any(torch.equal(a["image"], b["image"]) for a, b in zip(batches[:7], batches[7:], strict=True))


def test_the_data_set_can_be_sent_to_a_spawned_process(root):
    loader = make_data(root, num_workers=0).train_dataloader()
    plan = next(iter(loader.sampler))
    assert equal_batches(pickle.loads(pickle.dumps(loader.dataset))[plan], loader.dataset[plan])


def test_copies_of_an_image_are_augmented_differently(root):
    data = make_data(root, num_workers=0, augment=AUGMENT | {"mixup": 0, "cutmix": 0, "erasing": 0})
    batch = next(iter(data.train_dataloader()))
    first, second = batch["index"].tolist()[:2]
    assert first == second
    assert not torch.equal(batch["image"][0], batch["image"][1])


def test_loading_leaves_the_global_generators_alone(root):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seed():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draw()
    seed()
    list(make_data(root, num_workers=0).train_dataloader())
    assert draw() == expected


def test_state_counts_consumed_not_prefetched_batches(root):
    for workers in (0, 2):
        loader = make_data(root, num_workers=workers).train_dataloader()
        batches = iter(loader)
        assert loader.state_dict() == {"epoch": 0, "batches": 0}
        for _ in range(3):
            next(batches)
        assert loader.state_dict() == {"epoch": 0, "batches": 3}
        loader.set_epoch(1)
        assert loader.state_dict() == {"epoch": 1, "batches": 0}
        assert len(loader) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_replaced_and_named_once(root, caplog, workers):
    data = make_data(root, num_workers=workers)
    with caplog.at_level(logging.WARNING):
        batches = epochs(data, 3)
    broken = data.names("train").index("n01440764/n01440764_11.JPEG")
    assert list(data.broken["train"]) == [broken]
    assert "truncated" in data.broken["train"][broken]
    messages = [record.getMessage() for record in caplog.records if "broken image skipped" in record.getMessage()]
    assert len(messages) == 1
    assert "n01440764_11.JPEG" in messages[0]
    assert all(len(batch["index"]) == 5 and broken not in batch["index"] for batch in batches)
    labels = data.images("train").labels
    for batch in batches:
        assert batch["label"].tolist() == [labels[i] for i in batch["index"]]


def test_broken_images_are_left_out_of_evaluation(tmp_path):
    root = make_imagenet_folder(tmp_path, broken=False)
    path = sorted((root / "val").glob("*/*"))[4]
    path.write_bytes(path.read_bytes()[:200])
    data = make_data(root, num_workers=0)
    indices = [index for batch in data.val_dataloader() for index in batch["index"].tolist()]
    assert sorted(indices) == [-1, 0, 1, 2, 3, *range(5, 18)]


def test_too_many_broken_images_stop_the_run(root):
    data = make_data(root, num_workers=0, broken_limit=0.02)
    with pytest.raises(ValueError, match=r"^1 of 36 images are broken, more than data.broken_limit=0.02 permits: n014"):
        epochs(data)


class OddImagesBroken(ArrayImages):
    def image(self, index):
        if index % 2:
            raise BrokenImage("odd")
        return super().image(index)


def identity(sample):
    return sample


def test_the_limit_counts_each_broken_image_once():
    images = OddImagesBroken(np.zeros((40, 32, 32, 3), np.uint8), np.arange(40), "flaky")
    loader = TrainLoader(BatchFetcher(images, identity), TrainSampler(40, 4), broken_limit=0.5)
    for epoch in range(3):
        loader.set_epoch(epoch)
        for batch in loader:
            assert all(i % 2 == 0 for i in batch["index"].tolist())
            assert batch["label"].tolist() == batch["index"].tolist()
    assert len(loader.broken) == 20
    with pytest.raises(ValueError, match="20 of 40 images are broken"):
        list(Loader(BatchFetcher(images, identity), EvalSampler(40, 4), broken_limit=0.475))
