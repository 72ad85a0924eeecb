"""Decoding gives Pillow's pixels, and broken files are recognised."""

import io
import os
import re
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from datamodules.decode import DIVISORS, MAX_PIXELS, BrokenImage, EncodedJPEG, decode, reduced_range
from datamodules.image_folder import ImageFolder
from datamodules.images import FileImages, list_images
from datamodules.segmentation import MaskedImages
from datamodules.transforms import resize
from retinue.utils.arithmetic import ceil_div

PHOTO = Image.fromarray(load_sample_images().images[0][:101, :147])
FORMATS = {
    "420": ("RGB", "JPEG", {"quality": 90}),
    "444": ("RGB", "JPEG", {"subsampling": 0}),
    "progressive": ("RGB", "JPEG", {"progressive": True}),
    "grey": ("L", "JPEG", {}),
    "cmyk": ("CMYK", "JPEG", {}),
    "png": ("RGB", "PNG", {}),
    "palette": ("P", "PNG", {}),
    "alpha": ("RGBA", "PNG", {}),
    "webp": ("RGB", "WEBP", {}),
}


def encoded(form):
    mode, file_format, options = FORMATS[form]
    file = io.BytesIO()
    PHOTO.convert(mode).save(file, file_format, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", FORMATS)
def test_pixels_equal_pillows(form):
    data = encoded(form)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)


@pytest.mark.parametrize("form", ["420", "progressive", "grey", "cmyk", "png"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_truncated_files_are_broken(form, share):
    data = encoded(form)
    with pytest.raises(BrokenImage, match=r".+"):
        decode(data[: int(len(data) * share)])


def test_superfluous_bytes_do_no_harm():
    data = encoded("420")
    np.testing.assert_array_equal(decode(data[:-2] + b"\0\0\0" + data[-2:]), decode(data))


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"no image at all", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_files_that_are_no_images_are_broken(data):
    with pytest.raises(BrokenImage, match=r".+"):
        decode(data)


@pytest.mark.parametrize(("kind", "form"), [(np.uint16, "PNG"), (np.int32, "TIFF"), (np.float32, "TIFF")])
def test_more_than_8_bits_per_channel_are_refused(kind, form):
    file = io.BytesIO()
    Image.fromarray(np.array(PHOTO.convert("L")).astype(kind) * 256).save(file, form)
    with pytest.raises(BrokenImage, match="it has more than 8 bits per channel"):
        decode(file.getvalue())


@pytest.mark.parametrize("form", ["420", "progressive", "grey", "cmyk", "png"])
def test_a_size_beyond_the_limit_is_refused_before_the_pixels_are_decoded(form):
    """A JPEG of 25 kB whose header says 65,500 x 65,500 px took 12.8 GB and 25 s."""
    data = encoded(form)
    if form == "png":
        start = data.index(b"IHDR")
        size = (65_500).to_bytes(4, "big")
        header = b"IHDR" + size + size + data[start + 12 : start + 17]
        data = data[:start] + header + zlib.crc32(header).to_bytes(4, "big") + data[start + 21 :]
    else:
        marker = re.search(b"\xff[\xc0\xc2]", data)
        assert marker is not None
        start = marker.start() + 5
        data = data[:start] + (65_500).to_bytes(2, "big") * 2 + data[start + 4 :]
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(BrokenImage, match=r"65500|decompression bomb"):
        decode(data)
    assert time.monotonic() - began < 1
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()


def test_the_limit_is_pillows_own():
    assert Image.MAX_IMAGE_PIXELS is not None
    assert MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def test_fifos_and_devices_are_no_images(tmp_path):
    """Reading a FIFO waited for ever, and reading /dev/zero filled the memory."""
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    names = ["fifo.png", "device.png"]
    images = FileImages(tmp_path, names, [0, 0])
    masks = MaskedImages(tmp_path, tmp_path, [(name, name) for name in names], {})
    for index in range(2):
        for read in (images.image, masks.image, masks.mask):
            with pytest.raises(BrokenImage, match="it is no regular file"):
                read(index)


def test_jfif_is_a_jpeg(tmp_path):
    (tmp_path / "a.JFIF").write_bytes(encoded("420"))
    assert list_images(tmp_path) == ["a.JFIF"]
    np.testing.assert_array_equal(FileImages(tmp_path, ["a.JFIF"], [0]).image(0), decode(encoded("420")))


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("divisor", DIVISORS)
def test_reduced_decoding_stays_near_the_whole_image_resized(subsampling, divisor):
    """The mean difference is at most 6 of 255, less than what moving the crop by half a pixel changes: 7 to 12."""
    photo, file = load_sample_images().images[0], io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG", quality=90, subsampling=subsampling)
    whole, jpeg = decode(file.getvalue()), EncodedJPEG(file.getvalue())
    assert jpeg.shape == whole.shape
    rng = np.random.default_rng(0)
    for _ in range(6):
        height, width = (int(rng.integers(divisor * 32, side)) for side in photo.shape[:2])
        top, left = int(rng.integers(0, photo.shape[0] - height + 1)), int(rng.integers(0, photo.shape[1] - width + 1))
        size = (height // divisor - 8, width // divisor - 8)
        part = jpeg.crop(top, left, height, width, size)
        assert part.shape == (height // divisor, width // divisor, 3)
        rows, columns = (
            reduced_range(start, length, ceil_div(side, divisor), divisor)
            for start, length, side in ((top, height, photo.shape[0]), (left, width, photo.shape[1]))
        )
        same_part = whole[divisor * rows.start : divisor * rows.stop, divisor * columns.start : divisor * columns.stop]
        difference = resize(part, size, "bicubic").astype(int) - resize(same_part, size, "bicubic")
        assert np.abs(difference).mean() < 6
        assert abs(difference.mean()) < 0.3


def test_a_reduced_crop_is_moved_by_less_than_one_of_its_pixels():
    rng = np.random.default_rng(0)
    for _ in range(300):
        divisor, side = int(rng.choice(DIVISORS)), int(rng.integers(16, 600))
        length = int(rng.integers(divisor, side + 1))
        start = int(rng.integers(0, side - length + 1))
        part = reduced_range(start, length, ceil_div(side, divisor), divisor)
        assert 0 <= part.start < part.stop <= ceil_div(side, divisor)
        assert abs(divisor * part.start - start) < divisor
        assert abs(divisor * part.stop - (start + length)) < 1.5 * divisor


def test_crops_smaller_than_twice_the_size_are_decoded_whole():
    photo = EncodedJPEG(encoded("420"))
    assert photo.crop(0, 0, 101, 147, (51, 60)).shape == (101, 147, 3)
    assert photo.crop(1, 2, 100, 144, (50, 60)).shape == (50, 72, 3)
    assert photo.crop(1, 2, 3, 4, (50, 60)).shape == (3, 4, 3)


def test_only_training_decodes_at_a_reduced_scale(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for name, form in (("1.jpg", "420"), ("2.jpg", "cmyk"), ("3.png", "png"), ("4.jpg", "grey")):
            (tmp_path / split / "a" / name).write_bytes(encoded(form))
        (tmp_path / split / "a" / "5.jpg").write_bytes(encoded("420")[:900])
    options = {"root": str(tmp_path), "image_size": 16, "batch_size": 5, "broken_limit": 0.5, "num_workers": 0}
    augment = {"scale": (0.6, 1.0), "hflip": 0.5}
    whole = ImageFolder(**options, augment=augment)
    reduced = ImageFolder(**options, augment=augment | {"decode": "reduced"})
    (ours,), (expected,) = reduced.val_dataloader(), whole.val_dataloader()
    assert ours["image"].equal(expected["image"])
    (ours,), (expected,) = reduced.train_dataloader(), whole.train_dataloader()
    assert reduced.broken == whole.broken
    assert list(reduced.broken["train"]) == [4]
    # The broken image is replaced by another one, which depends on what was drawn before.
    same = ours["index"] == expected["index"]
    assert same.sum() >= 4
    difference = (ours["image"].int() - expected["image"].int()).abs().float().mean((1, 2, 3))[same]
    assert 0 < difference.max() < 25
