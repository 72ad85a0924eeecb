"""Normalising, erasing and mixing of classification batches agree with timm."""

import random

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

from datamodules.batch import BatchTransform, Buffers, normalise
from datamodules.loader import private_rng, seed_rng
from datamodules.transforms import Augment

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
ALL_ON = Augment(mixup=0.8, cutmix=1.0, mixup_prob=0.9, erasing=0.5, label_smoothing=0.1)


def make_batch(size=6, seed=5):
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (size, 20, 24, 3), np.uint8)).permute(0, 3, 1, 2)
    return {"image": image, "label": torch.arange(size) % 4, "index": torch.arange(size), "seed": seed}


def test_normalise():
    batch = make_batch()
    image = normalise(batch["image"], torch.tensor(MEAN), torch.tensor(STD))
    expected = (batch["image"] / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)
    assert image.is_contiguous(memory_format=torch.channels_last)


def test_evaluation_is_only_normalised():
    batch = make_batch()
    del batch["seed"]
    out = BatchTransform(MEAN, STD, 4, ALL_ON)(batch)
    assert "target" not in out
    torch.testing.assert_close(out["image"], normalise(batch["image"], torch.tensor(MEAN), torch.tensor(STD)))


@pytest.mark.parametrize(
    "augment",
    [
        ALL_ON,
        Augment(mixup=0.2),
        Augment(cutmix=1.0, label_smoothing=0.2),
        Augment(mixup=1.0, cutmix=1.0, switch_prob=0.2),
    ],
)
def test_mixing_and_erasing_agree_with_timm(augment):
    ours = BatchTransform(MEAN, STD, 4, augment)
    mix = Mixup(
        augment.mixup,
        augment.cutmix,
        None,
        augment.mixup_prob,
        augment.switch_prob,
        label_smoothing=augment.label_smoothing,
        num_classes=4,
    )
    for seed in range(30):
        batch = make_batch(seed=seed)
        out = ours(batch)
        with private_rng():
            seed_rng(seed)
            image = normalise(batch["image"], torch.tensor(MEAN), torch.tensor(STD))
            if augment.erasing:
                image = RandomErasing(augment.erasing, mode="pixel", device="cpu")(image)
            image, target = mix(image, batch["label"])
        torch.testing.assert_close(out["image"], image, atol=1e-5, rtol=0)
        torch.testing.assert_close(out["target"], target, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 5, 40])
def test_batches_of_any_size_are_mixed(size):
    batch = make_batch(size) | {"label": torch.arange(size)}
    out = BatchTransform(MEAN, STD, 40, Augment(mixup=1.0))(batch)
    lam = out["target"][0, 0].item()
    normalised = normalise(batch["image"], torch.tensor(MEAN), torch.tensor(STD))
    if size > 1:
        assert 0 < lam < 1
        torch.testing.assert_close(out["image"], lam * normalised + (1 - lam) * normalised.flip(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(out["target"].sum(1), torch.ones(size))
    pasted = BatchTransform(MEAN, STD, 40, Augment(cutmix=1.0))(batch)["image"]
    own, other = pasted == normalised, pasted == normalised.flip(0)
    assert (own | other).all() and (size == 1 or not own.all())


def test_no_target_without_mixing():
    assert "target" not in BatchTransform(MEAN, STD, 4, Augment(label_smoothing=0.1, erasing=1.0))(make_batch())


def test_result_depends_on_the_seed_alone_and_global_generators_are_restored():
    transform = BatchTransform(MEAN, STD, 4, ALL_ON)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    first = transform(make_batch(seed=7))["image"]
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected
    assert torch.equal(first, transform(make_batch(seed=7))["image"])
    assert not torch.equal(first, transform(make_batch(seed=8))["image"])


def test_memory_of_large_batches_is_used_again_when_no_tensor_refers_to_it(monkeypatch):
    monkeypatch.setattr(Buffers, "SMALLEST", 0)
    expected = [BatchTransform(MEAN, STD, 4, ALL_ON)(make_batch(seed=seed))["image"] for seed in range(3)]
    transform = BatchTransform(MEAN, STD, 4, ALL_ON)
    kept = [transform(make_batch(seed=seed))["image"][1:, 0] for seed in range(2)]
    places = {image.data_ptr() for image in kept}
    third = transform(make_batch(seed=2))["image"]
    assert len({*places, third[1:, 0].data_ptr()}) == 3
    for image, right in zip((*kept, third[1:, 0]), expected, strict=True):
        torch.testing.assert_close(image, right[1:, 0], atol=0, rtol=0)
    del kept[0], image
    assert transform(make_batch())["image"][1:, 0].data_ptr() in places
