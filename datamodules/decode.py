"""Decode image files to arrays."""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image

from retinue.utils.arithmetic import ceil_div

# Largest number of pixels that an image may have: the limit at which Pillow refuses an image as a decompression bomb.
MAX_PIXELS = 178_956_970
# Colour spaces of JPEGs for which simplejpeg's pixels are Pillow's.
JPEG_COLOURS = ("YCbCr", "Gray", "RGB")
# Divisors of an image's sides that libjpeg can apply while it decodes, in less time than it takes for the whole image.
DIVISORS = (2, 4, 8)


class BrokenImage(Exception):
    """Error for an image that cannot be read; the message gives the reason."""


def decode(data: bytes) -> np.ndarray:
    """Decode an image (JPEG, PNG, ...) to exactly the pixels that Pillow decodes.

    The size is read from the file's header and checked before memory for the pixels is allocated.

    Published accuracies were measured on Pillow's pixels. simplejpeg decodes those JPEGs for which it gives the same
    pixels in less time. Pillow decodes CMYK, other formats and everything that simplejpeg refuses, so Pillow alone
    decides whether an image is broken.

    Args:
        data: content of the image file.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        BrokenImage: if the data are truncated, are no image, or have more than 8 bits per channel or more than
            `MAX_PIXELS` pixels.
    """
    if data[:2] == b"\xff\xd8":
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            check_pixels(int(width), int(height))
            if colours in JPEG_COLOURS:
                return simplejpeg.decode_jpeg(data)
        except ValueError:
            # Pillow decides below whether the image is broken.
            pass
    try:
        with Image.open(io.BytesIO(data)) as image:
            check_pixels(*image.size)
            if image.mode[0] in "IF":
                # Pillow's conversion would clip all values at 255 and leave a white image.
                raise ValueError(f"it has more than 8 bits per channel (Pillow's mode {image.mode})")
            return np.array(image.convert("RGB"))
    except BrokenImage:
        raise
    except Exception as error:
        # Pillow's decoders raise errors of many types: OSError, SyntaxError, struct.error, DecompressionBombError.
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image in a format that Pillow knows"
        else:
            reason = str(error) if str(error) else type(error).__name__
        raise BrokenImage(reason) from error


class EncodedJPEG:
    """A JPEG that is decoded once it is known which part of it is needed, and how large this part will be.

    libjpeg then decodes at 1/2, 1/4 or 1/8 of the size, for which it computes fewer pixels from the coefficients. The
    pixels differ a little from those of a whole decoded image that is resized, so this is for training only.

    Args:
        data: content of the file, in a colour space that simplejpeg decodes as Pillow does.

    Attributes:
        shape: height, width and number of channels of the whole image.

    Raises:
        ValueError: if it is no such JPEG.
        BrokenImage: if the image has more than `MAX_PIXELS` pixels.
    """

    def __init__(self, data: bytes):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        check_pixels(int(width), int(height))
        if colours not in JPEG_COLOURS:
            raise ValueError(f"its colour space is {colours}")
        self.data, self.shape = data, (int(height), int(width), 3)

    def crop(self, top: int, left: int, height: int, width: int, size: tuple[int, int]) -> np.ndarray:
        """Return a part of the image, reduced by the largest divisor that leaves it no smaller than `size`.

        The part is moved and enlarged or reduced by less than one pixel of the result.

        Args:
            top: first row of the part.
            left: first column of the part.
            height: rows of the part.
            width: columns of the part.
            size: height and width to which the part will be resized.

        Returns:
            uint8 (h, w, 3) with h from `size[0]` to `height`, and w likewise.

        Raises:
            BrokenImage: if the image cannot be decoded.
        """
        fitting = [d for d in DIVISORS if height >= d * size[0] and width >= d * size[1]]
        divisor = max(fitting, default=1)
        try:
            h, w = (ceil_div(side, divisor) for side in self.shape[:2])
            image = simplejpeg.decode_jpeg(self.data, min_height=h, min_width=w) if divisor > 1 else decode(self.data)
        except ValueError:
            # Pillow decides whether the image is broken.
            image, divisor = decode(self.data), 1
        rows, columns = (reduced_range(start, length, side, divisor) for start, length, side in (
            (top, height, image.shape[0]), (left, width, image.shape[1]),
        ))  # fmt: skip
        return image[rows, columns]


def reduced_range(start: int, length: int, side: int, divisor: int) -> slice:
    """Return the range of pixels, in an image reduced by `divisor`, that shows a range of the whole image.

    Args:
        start: first pixel in the whole image.
        length: number of pixels in the whole image, at least `divisor`.
        side: number of pixels along this axis of the reduced image.
        divisor: side of the whole image divided by that of the reduced image.
    """
    length = length // divisor
    start = min(round(start / divisor), side - length)
    return slice(start, start + length)


def check_pixels(width: int, height: int) -> None:
    """Refuse an image that is too large to decode.

    Raises:
        BrokenImage: if the image has more than `MAX_PIXELS` pixels.
    """
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"it has {width} x {height} px, more than {MAX_PIXELS:,} pixels in all")


def read_size(path: str | os.PathLike) -> tuple[int, int]:
    """Return the height and width of an image file, from its header.

    Raises:
        BrokenImage: if the file cannot be read or is no image.
    """
    try:
        with _open_regular(path) as file, Image.open(file) as image:
            return image.height, image.width
    except Exception as error:
        raise BrokenImage(str(error)) from error


def read_file(path: str | os.PathLike) -> bytes:
    """Return the content of an image or mask file.

    Raises:
        BrokenImage: if the path is a FIFO, a device or a folder. Reading a FIFO or a device could wait for ever.
        OSError: if the file cannot be read.
    """
    with _open_regular(path) as file:
        return file.read()


@contextmanager
def _open_regular(path: str | os.PathLike) -> Iterator[BinaryIO]:
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BrokenImage("it is no regular file, but a FIFO or a device")
        yield file
