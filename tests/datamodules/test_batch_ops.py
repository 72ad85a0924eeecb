"""Ops on whole batches give Pillow's pixels, and they are drawn as timm draws them."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.auto_augment import NAME_TO_OP

from datamodules.auto_augment import OP_NAMES, Op, apply_ops, arguments
from datamodules.batch import BatchTransform
from datamodules.batch_ops import CHANGES, apply_batch_ops
from datamodules.loader import private_rng, seed_rng, stack
from datamodules.transforms import Augment, TrainTransform
from tests.datamodules.test_resume import FewDigits

PHOTO = np.array(load_sample_images().images[0])
HEIGHT, WIDTH = 40, 56
FILL = (124, 16, 4)
AMOUNTS = {
    "Rotate": (-30.0, -7.3, 0.0, 12.0, 90.0),
    "Posterize": (0, 1, 3, 4, 8),
    "PosterizeIncreasing": (0, 2),
    "PosterizeOriginal": (4, 7),
    "Solarize": (0, 60, 128, 256),
    "SolarizeIncreasing": (26, 255),
    "SolarizeAdd": (0, 55, 110),
    "ShearX": (-0.3, 0.0, 0.11),
    "ShearY": (-0.27, 0.3),
    "TranslateX": (-21.4, 0.0, 100.0),
    "TranslateY": (3.0, -9.7),
    "TranslateXRel": (0.45, -0.2),
    "TranslateYRel": (-0.45, 0.123),
    "Desaturate": (0.5, 0.8, 1.0),
    "GaussianBlur": (0.1, 0.77, 1.3, 2.0),
}
FACTORS = (0.1, 0.55, 1.0, 1.9)


def photos(count):
    """Return photos with few and many values, and one of a single colour."""
    rng = np.random.default_rng(0)
    corners = [(rng.integers(0, 380), rng.integers(0, 580)) for _ in range(count)]
    images = np.stack([PHOTO[y : y + HEIGHT, x : x + WIDTH] for y, x in corners])
    images[0] = 77
    images[1] = images[1] // 8 * 3 + 40
    return images


@pytest.mark.parametrize("name", [name for name in OP_NAMES[1:] if name != "GaussianBlurRand"])
@pytest.mark.parametrize("bicubic", [True, False])
def test_pixels_are_within_1_of_pillows(name, bicubic):
    has_argument = bool(arguments(Op(name, 1.0, bicubic)))
    amounts = AMOUNTS.get(name, FACTORS if has_argument else (0,))
    images = photos(5)
    ops = np.array([[[OP_NAMES.index(name), amount, bicubic]] for amount in amounts for _ in images])
    batch = torch.from_numpy(np.concatenate([images] * len(amounts))).permute(0, 3, 1, 2)
    changed = apply_batch_ops(batch, ops, FILL)
    assert changed.is_contiguous(memory_format=torch.channels_last)
    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    for image, pixels, op in zip(batch, changed, ops, strict=True):
        drawn = Op(name, float(op[0, 1]), bicubic)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        if name.startswith("Posterize") and drawn.amount < 1:
            expected = np.zeros((HEIGHT, WIDTH, 3))
        else:
            expected = np.asarray(NAME_TO_OP[name](picture, *arguments(drawn), fillcolor=FILL, resample=resample))
        difference = np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.max() <= 1
        assert np.mean(difference > 0) < 0.1


def test_every_op_is_done_by_one_function():
    names = [name for names in CHANGES.values() for name in names]
    assert sorted(names) == sorted(name for name in OP_NAMES[1:] if name != "GaussianBlurRand")


@pytest.mark.parametrize("recipe", ["rand-m9-mstd0.5-inc1", "rand-m10-n3-mstd101-p0.8", "original", "v0", "3a", None])
@pytest.mark.parametrize("channels, interpolation", [(3, "bicubic"), (1, "random")])
def test_the_device_applies_what_the_cpu_would(recipe, channels, interpolation):
    """The draws are the same; two consecutive ops may amplify a difference of 1."""
    options = {"auto_augment": recipe, "color_jitter": 0.4, "hflip": 0.5, "interpolation": interpolation}
    mean = (0.4, 0.5, 0.6)[:channels]
    on_cpu, on_device = (
        TrainTransform(Augment(**options, device=device), 40, mean=mean, in_chans=channels) for device in (None, "gpu")
    )
    samples, expected = [], []
    with private_rng():
        for seed, image in enumerate(photos(24)):
            seed_rng(seed)
            samples.append(on_device({"image": image, "label": np.int64(0), "index": np.int64(seed)}))
            after = np.random.rand()
            seed_rng(seed)
            expected.append(on_cpu({"image": image})["image"])
            assert np.random.rand() == after
    assert on_device.sampler is not None
    batch = stack(samples)
    assert isinstance(batch["ops"], np.ndarray)
    ones, zeros = (1 / 255,) * channels, (0.0,) * channels
    out = BatchTransform(zeros, ones, 2, Augment(), on_device.sampler.fill)(batch)
    assert "ops" not in out
    difference = (out["image"] - torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2)).abs().mean((1, 2, 3))
    assert (difference < 1).sum() >= 20


def test_the_cpu_applies_the_same_ops_one_by_one():
    ops = [Op("Invert", 0.0, True), Op("ShearY", 0.2, True), Op("Contrast", 1.4, True), Op("Rotate", 9.0, False)]
    image = photos(3)[2]
    expected = Image.fromarray(image)
    for op in ops:
        resample = Image.Resampling.BICUBIC if op.bicubic else Image.Resampling.BILINEAR
        expected = NAME_TO_OP[op.name](expected, *arguments(op), fillcolor=FILL, resample=resample)
    assert np.abs(apply_ops(image, ops, FILL).astype(int) - np.asarray(expected)).max() <= 2


def test_aug_mix_cannot_be_drawn_in_advance():
    with pytest.raises(ValueError, match=r"^augment.device=gpu has no AugMix: "):
        TrainTransform(Augment(auto_augment="augmix-m3-w3", device="gpu"), 32)


def test_batches_with_ops_depend_neither_on_workers_nor_on_the_start():
    augment = {"pad_crop": 2, "auto_augment": "rand-m9-mstd0.5-inc1", "device": "gpu", "color_jitter": 0.2}

    def batches(workers, start=0):
        data = FewDigits(image_size=32, batch_size=10, augment=augment, num_workers=workers, seed=3)
        loader = data.train_dataloader()
        loader.load_state_dict({"epoch": 1, "batches": start})
        return [data.on_after_batch_transfer(batch, 0)["image"] for batch in loader]

    whole = batches(0)
    assert len(whole) == 5
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], batches(2, start=2), strict=True))
