"""Decoding gives Pillow's pixels, and broken files are recognised."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from datamodules.decode import BrokenImage, decode

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
