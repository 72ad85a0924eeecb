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

from datamodules.decode import MAX_PIXELS, BrokenImage, decode
from datamodules.images import FileImages, list_images
from datamodules.segmentation import MaskedImages

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
