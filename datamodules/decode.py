"""Decode image files to arrays."""

import io
import os
import stat

import numpy as np
import simplejpeg
from PIL import Image

# Largest number of pixels that an image may have: the limit at which Pillow refuses an image as a decompression bomb.
MAX_PIXELS = 178_956_970


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
            if colours in ("YCbCr", "Gray", "RGB"):
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
        with Image.open(io.BytesIO(read_file(path))) as image:
            return image.height, image.width
    except Exception as error:
        raise BrokenImage(str(error)) from error


def read_file(path: str | os.PathLike) -> bytes:
    """Return the content of an image or mask file.

    Raises:
        BrokenImage: if the path is a FIFO, a device or a folder. Reading a FIFO or a device could wait for ever.
        OSError: if the file cannot be read.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BrokenImage("it is no regular file, but a FIFO or a device")
        return file.read()
