"""Corruptions of test images, compared with figures of the authors' code on two photos.

`corruption_figures.json` holds, for each side of the images, corruption and severity, [mean, deviation, mean absolute
change] of the corrupted images, from 0 to 255. They were computed by the authors' `make_cifar_c.py` (32 px) and
`make_imagenet_c.py` (224 px) with OpenCV, ImageMagick and the authors' photos of frost, on the images of `crops`.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from datamodules.corruption_levels import BENCHMARK, CIFAR, EXTRA, IMAGENET, NAMES
from datamodules.corruptions import corrupt
from datamodules.digits import Digits

FIGURES = json.loads((Path(__file__).parent / "corruption_figures.json").read_text(encoding="utf-8"))
# Corruptions in which an image's figures depend much on what is drawn for it, and the tolerance of their figures.
# The textures of frost are not the authors' photos, and spatter has another rule for the drops' edges.
DRAWN = {"fog": 0.12, "frost": 0.2, "snow": 0.12, "elastic_transform": 0.12, "motion_blur": 0.12, "spatter": 0.35}


@cache
def crops(side: int, count: int) -> list[np.ndarray]:
    """Return crops of scikit-learn's two sample photos, uint8 (side, side, 3)."""
    images = []
    for photo in load_sample_images().images:
        small = Image.fromarray(photo).resize((side * 2, side * 4 // 3), Image.Resampling.BOX)
        lefts = [k * side // (count // 2) for k in range(count // 2)]
        images += [np.asarray(small.crop((left, 0, left + side, side))) for left in lefts]
    return images


def redrawn(images: list[np.ndarray], draws: int) -> list[np.ndarray]:
    """Return the images several times with another pixel in the corner, for which other numbers are drawn."""
    copies = [image.copy() for image in images for _ in range(draws)]
    for number, image in enumerate(copies):
        image[0, 0] = number
    return copies


def figures(name: str, severity: int, images: list[np.ndarray]) -> list[float]:
    """Return the mean, the deviation and the mean absolute change of the corrupted images."""
    pairs = [(corrupt(image, name, severity).astype(float), image) for image in images]
    changes = [np.abs(changed - image).mean() for changed, image in pairs]
    means, deviations = [changed.mean() for changed, _ in pairs], [changed.std() for changed, _ in pairs]
    return [float(np.mean(values)) for values in (means, deviations, changes)]


def check(name: str, severity: int, side: int, images: list[np.ndarray]) -> None:
    mean, deviation, change = FIGURES[str(side)][name][severity - 1]
    ours = figures(name, severity, images)
    tolerance = DRAWN.get(name, 0.03)
    # Noise of another draw, and values that are rounded down, remain where a corruption changes little.
    slack = 0.3 if name not in DRAWN else 1.5
    assert ours[0] == pytest.approx(mean, rel=tolerance, abs=slack)
    assert ours[1] == pytest.approx(deviation, rel=tolerance, abs=slack)
    assert ours[2] == pytest.approx(change, rel=tolerance, abs=slack)


@pytest.mark.parametrize("name", (*BENCHMARK, *EXTRA))
def test_small_images_have_the_figures_of_cifar_10_c(name):
    for severity in range(1, 6):
        check(name, severity, 32, crops(32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("name", (*BENCHMARK, *EXTRA))
def test_large_images_have_the_figures_of_imagenet_c(name):
    for severity in range(1, 6):
        check(name, severity, 224, redrawn(crops(224, 4), 10 if name in DRAWN else 1))


def test_both_tables_have_five_strengths_of_every_corruption():
    for table in (IMAGENET, CIFAR):
        assert set(table) == {*BENCHMARK, *EXTRA}
        assert all(len(levels) == 5 for levels in table.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_corruption_follows_from_the_image_alone_and_takes_any_shape(name):
    image = crops(224, 4)[0][150:190, 50:106]
    first = corrupt(image, name, 3)
    np.random.seed(7)
    assert np.array_equal(first, corrupt(image.copy(), name, 3))
    assert first.shape == image.shape and first.dtype == np.uint8
    assert not np.array_equal(first, image)
    assert not np.array_equal(first, corrupt(image, name, 5))
    grey = corrupt(image[..., :1], name, 3)
    assert grey.shape == (40, 56, 1)


def test_two_images_have_different_noise():
    black = np.zeros((16, 16, 3), np.uint8)
    dark = black.copy()
    dark[0, 0] = 1
    assert not np.array_equal(corrupt(black, "gaussian_noise", 5)[1:], corrupt(dark, "gaussian_noise", 5)[1:])


def test_blurs_of_larger_images_are_as_wide_relative_to_the_image():
    """A step of 224 px, blurred, looks like the same step of 448 px, blurred."""
    step = np.zeros((224, 224, 3), np.uint8)
    step[:, 112:] = 255
    for name in ("gaussian_blur", "defocus_blur"):
        small, large = corrupt(step, name, 5), corrupt(step.repeat(2, 0).repeat(2, 1), name, 5)
        assert np.abs(small.astype(float) - large[::2, ::2]).mean() < 1


def test_occlusion_covers_its_share_and_shuffling_keeps_the_pixels():
    image = np.random.default_rng(0).integers(1, 256, (28, 28, 3), dtype=np.uint8)
    for severity, share in enumerate((0.1, 0.25, 0.5, 0.75, 0.9), start=1):
        assert (corrupt(image, "occlusion", severity) == 0).mean() == pytest.approx(share, abs=0.003)
    # A grid of 2 x 2 cells of 14 px: each cell of the result is one of the image's cells, and none is there twice.
    cells = lambda array: sorted(array[i : i + 14, j : j + 14].tobytes() for i in (0, 14) for j in (0, 14))  # noqa: E731
    assert cells(corrupt(image, "patch_shuffle", 1)) == cells(image)
    rest = np.random.default_rng(0).integers(1, 256, (30, 30, 3), dtype=np.uint8)
    assert np.array_equal(np.sort(corrupt(rest, "patch_shuffle", 5), axis=None), np.sort(rest, axis=None))


def test_only_the_test_images_of_a_data_set_are_corrupted():
    clean = Digits(image_size=32, crop_pct=1.0, num_workers=0, batch_size=64)
    changed = Digits(
        image_size=32, crop_pct=1.0, num_workers=0, batch_size=64, corrupt={"name": "fog", "severity": 3}
    )  # fmt: skip
    pairs = [next(iter(data.test_dataloader()))["image"] for data in (clean, changed)]
    before = pairs[0][5].permute(1, 2, 0).numpy()
    assert np.array_equal(pairs[1][5].permute(1, 2, 0).numpy(), corrupt(before, "fog", 3))
    pairs = [next(iter(data.val_dataloader()))["image"] for data in (clean, changed)]
    assert pairs[0].equal(pairs[1])


@pytest.mark.parametrize(
    ("name", "severity", "channels", "message"),
    [
        ("fogg", 3, 3, "no corruption is called 'fogg'. Did you mean 'fog'?"),
        ("fog", 6, 3, "from 1 to 5, not 6"),
        ("fog", 3, 4, "not of 4 bands"),
    ],
)
def test_wrong_corruptions_are_refused(name, severity, channels, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        corrupt(np.zeros((16, 16, channels), np.uint8), name, severity)
