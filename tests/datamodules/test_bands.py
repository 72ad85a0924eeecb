"""Images of many bands: files, statistics and transforms; tests/retinue/runs/test_bands.py trains with them."""

import json

import numpy as np
import pytest
import torch

from datamodules.bands import BandEvalTransform, read_bands
from datamodules.batch import normalise
from datamodules.decode import BrokenImage
from datamodules.image_folder import ImageFolder
from scripts.band_statistics import main as band_statistics
from tests.band_folder import BANDS, make_band_folder, npy, tiff

RNG = np.random.default_rng(0)


def values(dtype) -> np.ndarray:
    """Return (BANDS, 6, 8), whose values are beyond 8 bits."""
    return (RNG.random((BANDS, 6, 8)) * 4000).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, np.float64])
def test_arrays_of_either_layout_are_read_in_their_units(dtype):
    array = values(dtype)
    for layout in (array, np.ascontiguousarray(array.transpose(1, 2, 0))):
        image = read_bands(npy(layout), "a.npy", BANDS)
        assert image.dtype == np.float32 and np.array_equal(image, array.transpose(1, 2, 0).astype(np.float32))
    assert read_bands(npy(array[0]), "a.npy", 1).shape == (6, 8, 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.int32])
def test_the_pages_of_a_tiff_file_are_bands(dtype):
    array = values(dtype)
    assert np.array_equal(read_bands(tiff(array), "a.TIF", BANDS), array.transpose(1, 2, 0).astype(np.float32))


@pytest.mark.parametrize(
    ("data", "name", "reason"),
    [
        (npy(np.zeros((6, 8, 4))), "a.npy", "its array of 6 x 8 x 4 has no side of data.in_chans=5"),
        (npy(np.full((6, 8, 5), np.nan)), "a.npy", "infinite or not a number"),
        (npy(np.array([[{}]])), "a.npy", "allow_pickle=False"),
        (npy(np.array([[["a"] * 5]])), "a.npy", "it holds no numbers"),
        (npy(np.zeros(7)), "a.npy", "its array has 1 dimensions, not 2 or 3"),
        (npy(np.zeros((6, 8, 5)))[:-9], "a.npy", "array"),
        (tiff(np.zeros((4, 6, 8), np.uint16)), "a.tif", "6 x 8 x 4 has no side"),
        (tiff(np.zeros((6, 6, 8), np.uint16)), "a.tif", "it has 6 pages, not data.in_chans=5"),
        (b"no image", "a.tif", "cannot identify image file"),
    ],
)
def test_other_files_are_broken(data, name, reason):
    with pytest.raises(BrokenImage, match=reason):
        read_bands(data, name, BANDS)


def test_values_keep_their_units_up_to_the_net():
    image = values(np.float32).transpose(1, 2, 0)
    transform = BandEvalTransform(6, crop_pct=1.0, crop_mode="center", interpolation="bilinear")
    cropped = transform({"image": image})["image"]
    assert np.array_equal(cropped, image[:, 1:7])
    batch = torch.from_numpy(cropped)[None].permute(0, 3, 1, 2)
    mean, std = torch.arange(5.0), torch.arange(1.0, 6.0)
    expected = (batch - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(normalise(batch, mean, std), expected, rtol=1e-6)
    assert np.array_equal(batch[0].permute(1, 2, 0).numpy(), cropped), "the batch itself must not change"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_band_folder(tmp_path_factory.mktemp("bands"))


def test_statistics_are_those_of_all_training_values(folder, capsys):
    band_statistics([f"root={folder}", f"in_chans={BANDS}"])
    lines = capsys.readouterr().out.splitlines()
    ones = [1.0] * BANDS
    images = ImageFolder(root=str(folder), in_chans=BANDS, mean=ones, std=ones).images("train")
    pixels = np.concatenate([images.image(i).reshape(-1, BANDS) for i in range(len(images))]).astype(np.float64)
    for line, expected in zip(lines, (pixels.mean(0), pixels.std(0)), strict=True):
        assert np.allclose(json.loads(line.partition("=")[2]), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": [0.5] * 3}, "data.mean and data.std need 5 values for data.in_chans=5, not 3 and 5"),
        ({"augment": {"auto_augment": "3a"}}, "recipe.augment.auto_augment must be null for images of bands"),
        ({"augment": {"color_jitter": 0.3}}, "recipe.augment.color_jitter must be 0 for images of bands"),
        ({"crop_mode": "border"}, "data.crop_mode must be center or squash"),
        ({"interpolation": "lanczos"}, "data.interpolation must be one of nearest, bilinear, bicubic"),
        ({"in_chans": 0}, "data.in_chans must be 1 or 3, not 0"),
        ({"bands": False}, "data.in_chans must be 1 or 3, not 5; data=image_folder takes any number"),
    ],
)
def test_wrong_values_are_refused(folder, arguments, message):
    arguments = {"in_chans": BANDS, "mean": [0.0] * BANDS, "std": [1.0] * BANDS} | arguments
    with pytest.raises(ValueError, match=message):
        ImageFolder(root=str(folder), **arguments)
