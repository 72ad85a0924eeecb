"""Images of any number of bands and any type of values: arrays (.npy) and TIFF files with a page for each band."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from datamodules.decode import BrokenImage, check_pixels
from datamodules.images import FileImages
from datamodules.transforms import Augment, EvalTransform, TrainTransform

EXTENSIONS = (".npy", ".tif", ".tiff")
# Interpolations that torch has for values of any range
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


class BandImages(FileImages):
    """Set of image files with `in_chans` bands each.

    The sample `self[i]` is {"image": float32 (H, W, in_chans), "label": int64} in the files' units.

    Args:
        files: the same set as image files.
        in_chans: number of bands that each file must have.
    """

    def __init__(self, files: FileImages, in_chans: int):
        self.root, self.files, self.labels = files.root, files.files, files.labels
        self.in_chans = in_chans

    @property
    def blank(self) -> dict:
        return {"image": np.zeros((32, 32, self.in_chans), np.float32), "label": np.int64(0)}

    def image(self, index: int) -> np.ndarray:
        return read_bands(self._read(index), self.name(index), self.in_chans)


def read_bands(data: bytes, name: str, in_chans: int) -> np.ndarray:
    """Decode an image of several bands, in the units of the file.

    Args:
        data: content of the file. In a .npy file an array (H, W, in_chans), (in_chans, H, W), or (H, W) of one band; in
            a TIFF file a page for each band, or one page with a channel for each band. Values are numbers of any type.
        name: name of the file, whose ending tells the format.
        in_chans: number of bands.

    Returns:
        float32 (H, W, in_chans).

    Raises:
        BrokenImage: if the file cannot be read, has another number of bands or more than `MAX_PIXELS` pixels, or holds
            values that are no numbers, infinite or not a number (NaN).
    """
    try:
        bands = _read_array(data) if name.lower().endswith(".npy") else _read_pages(data, in_chans)
    except BrokenImage:
        raise
    except Exception as error:
        # Readers of damaged files raise errors of many types.
        raise BrokenImage(str(error) if str(error) else type(error).__name__) from error
    if bands.ndim == 2:
        bands = bands[..., None]
    if bands.ndim != 3:
        raise BrokenImage(f"its array has {bands.ndim} dimensions, not 2 or 3")
    if bands.shape[2] != in_chans and bands.shape[0] == in_chans:
        bands = bands.transpose(1, 2, 0)
    if bands.shape[2] != in_chans:
        raise BrokenImage(f"its array of {' x '.join(map(str, bands.shape))} has no side of data.in_chans={in_chans}")
    check_pixels(bands.shape[1], bands.shape[0])
    if not bands.size or bands.dtype.kind not in "buif":
        raise BrokenImage(f"it holds no numbers, but {bands.size} values of type {bands.dtype}")
    bands = np.ascontiguousarray(bands, np.float32)
    if not np.isfinite(bands).all():
        raise BrokenImage("it holds values that are infinite or not a number (NaN)")
    return bands


def _read_array(data: bytes) -> np.ndarray:
    """Read an array of numbers; arrays of objects, which could execute code, are refused."""
    return np.load(io.BytesIO(data), allow_pickle=False)


def _read_pages(data: bytes, in_chans: int) -> np.ndarray:
    """Read the pages of an image file: (H, W, pages), or (H, W, channels) of a single page."""
    with Image.open(io.BytesIO(data)) as image:
        pages, count = [], getattr(image, "n_frames", 1)
        # A small file may have very many pages, so refuse them before any is decoded.
        if count > in_chans:
            raise BrokenImage(f"it has {count} pages, not data.in_chans={in_chans}")
        for page in range(count):
            image.seek(page)
            check_pixels(*image.size)
            pages.append(np.array(image))
    if len({page.shape for page in pages}) > 1:
        raise BrokenImage("its pages differ in size")
    if len(pages) == 1:
        return pages[0]
    if pages[0].ndim != 2:
        raise BrokenImage(f"each of its {len(pages)} pages has {pages[0].shape[2]} channels, not 1")
    return np.stack(pages, axis=-1)


class BandEvalTransform(EvalTransform):
    """Resize and crop an evaluation sample, float32 (H, W, C), with the sizes of `EvalTransform`.

    Args:
        image_size: side, or (height, width), of the result.
        crop_mode: center or squash, as in timm.
        interpolation: one of `INTERPOLATIONS`.
        common: further arguments of `EvalTransform`.

    Raises:
        ValueError: if `interpolation` or `crop_mode` is not for bands.
    """

    def __init__(self, image_size: int | tuple[int, int], *, crop_mode: str, interpolation: str, **common: Any):
        if interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise ValueError(f"data.interpolation must be one of {known} for images of bands, not {interpolation!r}")
        if crop_mode == "border":
            raise ValueError("data.crop_mode must be center or squash for images of bands, not 'border'")
        super().__init__(image_size, crop_mode=crop_mode, interpolation=interpolation, **{**common, "in_chans": 3})

    def __call__(self, sample: dict) -> dict:
        image = self.resize_and_crop(torch.from_numpy(sample["image"]).permute(2, 0, 1))
        return sample | {"image": np.ascontiguousarray(image.permute(1, 2, 0).numpy())}


class BandTrainTransform(TrainTransform):
    """Crop, resize and mirror a training sample, float32 (H, W, C).

    Args:
        augment: the recipe's augmentation.
        image_size: side, or (height, width), of the result.
        mean: not used.
        in_chans: not used.

    Raises:
        ValueError: if the augmentation changes colours, which only images of 8 bits in three channels have.
    """

    def __init__(self, augment: Augment, image_size: int | tuple[int, int], **common: Any):
        for key, off in (("auto_augment", None), ("color_jitter", 0.0)):
            value = getattr(augment, key)
            if value != off:
                switch = "null" if off is None else "0"
                raise ValueError(
                    f"recipe.augment.{key} must be {switch} for images of bands, which have no colours, not {value!r}"
                )
        super().__init__(augment, image_size)


def band_statistics(images: BandImages, limit: int = 1000) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each band over at most `limit` images, spread evenly over the set."""
    total, squares, count = np.zeros(images.in_chans), np.zeros(images.in_chans), 0
    for index in np.unique(np.linspace(0, len(images) - 1, min(limit, len(images))).astype(int)):
        values = images.image(int(index)).reshape(-1, images.in_chans).astype(np.float64)
        total, squares, count = total + values.sum(0), squares + (values**2).sum(0), count + len(values)
    mean = total / count
    return mean.tolist(), np.sqrt(np.maximum(squares / count - mean**2, 0)).tolist()
