"""Geometry and colour for detection and segmentation: a sample's image, boxes and masks change together.

A sample has `image`, uint8 (H, W, 3), and may have
    boxes    float32 (N, 4), (x1, y1, x2, y2) in pixels, with `labels` (N,) and possibly `masks`, uint8 (N, H, W)
    ignored  float32 (M, 4), boxes of crowds
    mask     uint8 (H, W), label of each pixel

The augmentations are those of mmdetection's and mmsegmentation's recipes: multi-scale resizing and cropping as in DETR
(arXiv:2005.12872, section 4), large-scale jitter (arXiv:2012.07177, section 3), random scaling and cropping as for
ADE20K, and SSD's photometric distortion (arXiv:1512.02325, section 2.2). mmdetection resizes an image and then crops
it. Here the region of the original image that corresponds to the crop is cut out first and resized afterwards, so each
image is resized only once, and only the part that is kept.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.batch import channel_values, normalise
from datamodules.transforms import known_fields, resize
from retinue.utils.masks import IGNORED

# Limits [short, long] of the sides before DETR's crop; 4200 px stands for no limit of the longer side.
DETR_SIZES = ((400, 4200), (500, 4200), (600, 4200))
# Minimum and maximum side of DETR's crop, in pixels.
DETR_CROP = (384, 600)
# Largest number of crops that are drawn for one image until no class covers too much of the crop.
MAX_CROP_TRIES = 10
# Minimum side of a box, in pixels; smaller boxes are dropped after a change of geometry.
MIN_BOX_SIDE = 0.01

Size = tuple[int, int]  # height, width
Window = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True, kw_only=True)
class DenseAugment:
    """Augmentation for detection and segmentation: the fields of a recipe's `augment` section.

    Attributes:
        sizes: limits [short, long] of the sides; one pair is drawn for each image. None means the data's image size.
        ratio: [minimum, maximum] of a random factor on the single pair of `sizes`. None means no factor.
        crop: [height, width] of a random crop in pixels; smaller images are kept whole. None means no crop.
        cat_max_ratio: maximum share of a crop that one class may cover, for segmentation; after ten tries the last crop
            is taken. None means no maximum.
        detr_crop: whether half of the images are first resized to a shorter side of 400, 500 or 600 px and cropped to
            sides of 384 to 600 px.
        hflip: probability of mirroring.
        photometric: whether brightness, contrast, saturation and hue are changed.
    """

    sizes: tuple[Size, ...] | None = None
    ratio: tuple[float, float] | None = None
    crop: Size | None = None
    cat_max_ratio: float | None = None
    detr_crop: bool = False
    hflip: float = 0.0
    photometric: bool = False

    @classmethod
    def from_config(cls, config: Mapping | None) -> "DenseAugment":
        """Read a recipe's `augment` section.

        Raises:
            ValueError: if a key is unknown or a value is out of its range.
        """
        values = known_fields(cls, config)
        if (sizes := values.get("sizes")) is not None:
            expected = "one or more pairs [short, long]"
            sizes = sizes if isinstance(sizes, Sequence) else [sizes]
            values["sizes"] = tuple(_pair(size, "sizes", expected) for size in sizes)
        for key, expected in (("ratio", "[minimum, maximum]"), ("crop", "[height, width]")):
            if values.get(key) is not None:
                values[key] = _pair(values[key], key, expected)
        augment = cls(**values)
        augment._check()
        return augment

    def _check(self) -> None:
        def require(valid: bool, key: str, expected: str) -> None:
            if not valid:
                raise ValueError(f"augment.{key} must be {expected}, not {getattr(self, key)!r}")

        sizes, ratio, max_share = self.sizes, self.ratio, self.cat_max_ratio
        if sizes is not None:
            ordered = len(sizes) > 0 and all(0 < short <= long for short, long in sizes)
            require(ordered, "sizes", "one or more pairs [short, long] with 0 < short <= long")
        if ratio is not None:
            require(0 < ratio[0] <= ratio[1], "ratio", "[minimum, maximum] with 0 < minimum <= maximum")
            require(sizes is None or len(sizes) == 1, "sizes", "a single pair if augment.ratio is set")
        require(self.crop is None or min(self.crop) > 0, "crop", "[height, width] in pixels")
        require(max_share is None or 0 < max_share <= 1, "cat_max_ratio", "above 0 and at most 1")
        require(max_share is None or self.crop is not None, "cat_max_ratio", "null if augment.crop is null")
        require(0 <= self.hflip <= 1, "hflip", "from 0 to 1")


def _pair(value: Any, key: str, expected: str) -> tuple:
    valid = isinstance(value, Sequence) and len(value) == 2 and all(isinstance(side, int | float) for side in value)
    if not valid:
        raise ValueError(f"augment.{key} must be {expected}, not {value!r}")
    return tuple(value)


def check_limits(image_size: Any) -> Sequence[int]:
    """Return `image_size` after checking that it is [short, long].

    Raises:
        ValueError: if it is not a pair of integers with 0 < short <= long.
    """
    is_pair = isinstance(image_size, Sequence) and len(image_size) == 2 and all(isinstance(s, int) for s in image_size)
    if not (is_pair and 0 < image_size[0] <= image_size[1]):
        raise ValueError(f"data.image_size must be [short, long] with 0 < short <= long, not {image_size!r}")
    return image_size


def fit_size(size: Size, limits: Sequence[float]) -> Size:
    """Return the largest size with the aspect ratio of `size` that fits the limits.

    Args:
        size: (height, width) of the image.
        limits: maximum of the shorter side and maximum of the longer side.

    Returns:
        (height, width), rounded, at least 1 each.
    """
    factor = min(limits[0] / min(size), limits[1] / max(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


class DenseTrainTransform:
    """Crop, resize, mirror and change the colours of a training sample.

    All random numbers come from Python's global generator.

    Args:
        augment: the recipe's augmentation.
        image_size: [short, long], the limits of the sides if the augmentation has no `sizes`.
    """

    def __init__(self, augment: DenseAugment, image_size: Size):
        self.augment = augment
        self.sizes = (image_size,) if augment.sizes is None else augment.sizes

    def __call__(self, sample: dict) -> dict:
        augment = self.augment
        height, width = sample["image"].shape[:2]
        window = (0, 0, height, width)
        if augment.detr_crop and random.random() < 0.5:
            scaled = fit_size((height, width), random.choice(DETR_SIZES))
            sides = [random.randint(*(min(limit, side) for limit in DETR_CROP)) for side in scaled]
            window = draw_window(window, scaled, (sides[0], sides[1]))
        factor = random.uniform(*augment.ratio) if augment.ratio else 1.0
        size = fit_size(window[2:], [int(limit * factor) for limit in random.choice(self.sizes)])
        if augment.crop:
            crop = min(augment.crop[0], size[0]), min(augment.crop[1], size[1])
            window, size = self._crop(window, size, crop, sample.get("mask")), crop
        sample = crop_resize_flip(sample, window, size, random.random() < augment.hflip)
        return sample | {"image": distort(sample["image"])} if augment.photometric else sample

    def _crop(self, window: Window, scaled: Size, size: Size, mask: np.ndarray | None) -> Window:
        max_share = self.augment.cat_max_ratio
        crop = draw_window(window, scaled, size)
        if mask is None or max_share is None:
            return crop
        for _ in range(MAX_CROP_TRIES - 1):
            top, left, height, width = crop
            pixels = np.bincount(mask[top : top + height, left : left + width].ravel(), minlength=256)[:IGNORED]
            if 0 < pixels.max() < max_share * pixels.sum():
                break
            crop = draw_window(window, scaled, size)
        return crop


class DenseEvalTransform:
    """Resize the image of an evaluation sample to fit [short, long].

    There is no antialiasing, as in mmdetection and mmsegmentation. The sample gets `original_size`, int64 (2,), the
    height and width before resizing. A `mask` keeps its size.

    Args:
        image_size: [short, long], the limits of the sides.
    """

    def __init__(self, image_size: Size):
        self.image_size = image_size

    def __call__(self, sample: dict) -> dict:
        image = sample["image"]
        resized = resize(image, fit_size(image.shape[:2], self.image_size), "bilinear", antialias=False)
        return sample | {"image": resized, "original_size": np.array(image.shape[:2])}


def draw_window(window: Window, scaled: Size, size: Size) -> Window:
    """Draw a random part of `window` that corresponds to a crop of `size` after resizing `window` to `scaled`."""
    top, left, *sides = window
    height, width = (
        max(1, round(side * crop_side / scaled_side))
        for side, crop_side, scaled_side in zip(sides, size, scaled, strict=True)
    )
    top += random.randint(0, sides[0] - height)
    left += random.randint(0, sides[1] - width)
    return top, left, height, width


def crop_resize_flip(sample: dict, window: Window, size: Size, flip: bool = False) -> dict:
    """Cut `window` out of a sample, resize it to `size` and mirror it if `flip`.

    Boxes are clipped to the window. If the sample has masks, a box that the window cuts becomes the tight box around
    the remaining part of its mask. Objects of which nothing remains are dropped.

    Args:
        sample: as in the module docstring; it is not changed.
        window: part of the image to keep, inside the image.
        size: (height, width) of the result.
        flip: whether the result is mirrored horizontally.

    Returns:
        A new sample.
    """
    top, left, height, width = window
    rows, columns = slice(top, top + height), slice(left, left + width)
    out = dict(sample)
    out["image"] = _mirror(resize(sample["image"][rows, columns], size, "bilinear", antialias=False), 1, flip)
    for key, axis in (("mask", 1), ("masks", 2)):
        if key in sample:
            out[key] = _mirror(_resize_masks(sample[key][..., rows, columns], size), axis, flip)
    if "ignored" in sample:
        ignored, _ = _move_boxes(sample["ignored"], window, size, flip)
        out["ignored"] = ignored[_is_large_enough(ignored)]
    if "boxes" in sample:
        boxes, cut = _move_boxes(sample["boxes"], window, size, flip)
        keep = _is_large_enough(boxes)
        if "masks" in sample and cut.any():
            mask_remains = np.any(out["masks"], axis=(1, 2))
            boxes[cut] = tight_boxes(out["masks"][cut])
            keep &= mask_remains | ~cut
        out["boxes"] = boxes[keep]
        for key in ("labels", "masks"):
            if key in sample and not keep.all():
                out[key] = out[key][keep]
    return out


def _move_boxes(boxes: np.ndarray, window: Window, size: Size, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes (N, 4) in the new image, clipped to it, and whether the window cuts each box (N,)."""
    top, left, height, width = window
    x, y = boxes[:, 0::2] - np.float32(left), boxes[:, 1::2] - np.float32(top)
    cut = np.any((x < 0) | (x > width) | (y < 0) | (y > height), axis=1)
    x = (x * np.float32(size[1] / width)).clip(0, size[1])
    y = (y * np.float32(size[0] / height)).clip(0, size[0])
    if flip:
        x = size[1] - x[:, ::-1]
    return np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1), cut


def _is_large_enough(boxes: np.ndarray) -> np.ndarray:
    return np.all(boxes[:, 2:] - boxes[:, :2] > MIN_BOX_SIDE, axis=1)


def tight_boxes(masks: np.ndarray) -> np.ndarray:
    """Return the smallest box around each of the masks (N, H, W): float32 (N, 4); zeros for an empty mask."""
    sides = []
    for axis in (1, 2):
        occupied = np.any(masks, axis=axis)  # (N, W), (N, H)
        first, end = occupied.argmax(1), occupied.shape[1] - occupied[:, ::-1].argmax(1)
        sides.append((first, np.where(occupied.any(1), end, 0)))
    (x1, x2), (y1, y2) = sides
    return np.stack([x1, y1, x2, y2], axis=1).astype(np.float32)


def _resize_masks(masks: np.ndarray, size: Size) -> np.ndarray:
    """Resize uint8 (..., H, W) to (..., h, w) by the nearest pixel centre, in a third of torch's time."""
    for axis in (-1, -2):
        side, length = masks.shape[axis], size[axis]
        if side != length:
            masks = masks.take(((np.arange(length) + 0.5) * (side / length)).astype(np.int64), axis)
    return masks


def _mirror(array: np.ndarray, axis: int, flip: bool) -> np.ndarray:
    """Mirror an array if `flip`; torch's flip takes a small part of the time of copying NumPy's reversed view."""
    return torch.from_numpy(np.ascontiguousarray(array)).flip(axis).numpy() if flip else array


def distort(image: np.ndarray) -> np.ndarray:
    """Apply SSD's photometric distortion (arXiv:1512.02325, section 2.2).

    Each of four changes has a probability of 0.5: brightness (by up to 32 of 255), contrast (factor 0.5 to 1.5, before
    or after the other colour changes), saturation (factor 0.5 to 1.5) and hue (by up to 18 of OpenCV's 180 degrees).

    Args:
        image: uint8 (H, W, 3), RGB.

    Returns:
        uint8 (H, W, 3), RGB.
    """
    brightness = random.uniform(-32, 32) if random.random() < 0.5 else 0.0
    contrast = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    contrast_first = random.random() < 0.5
    saturation = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    # Share of a full circle by which the hue turns.
    hue = random.uniform(-0.1, 0.1) if random.random() < 0.5 else 0.0

    values = np.arange(256)
    levels = (values + brightness).clip(0, 255) * (contrast if contrast_first else 1.0)
    image = _map_values(image, levels)
    if saturation != 1 or hue:
        hsv = np.array(Image.fromarray(image).convert("HSV"))
        hsv[..., 0] = ((values + round(256 * hue)) % 256).astype(np.uint8)[hsv[..., 0]]
        hsv[..., 1] = _map_values(hsv[..., 1], values * saturation)
        height, width = image.shape[:2]
        image = np.asarray(Image.frombytes("HSV", (width, height), hsv.tobytes()).convert("RGB"))
    return image if contrast_first else _map_values(image, values * contrast)


def _map_values(image: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Replace each value v from 0 to 255 by levels[v], rounded and clipped."""
    table = levels.round().clip(0, 255).astype(np.uint8)
    return image if np.array_equal(table, np.arange(256)) else table[image]


def pad_images(images: Sequence[np.ndarray], size: Size) -> tuple[Tensor, Tensor]:
    """Join images to one batch, padded with zeros at the right and the bottom.

    Args:
        images: uint8 (h, w, 3) each.
        size: (height, width) of the batch, at least that of each image.

    Returns:
        The batch, uint8 (B, 3, height, width) in channels-last memory, and the images' sizes (h, w), int64 (B, 2).
    """
    batch = np.zeros((len(images), *size, 3), np.uint8)
    for padded, image in zip(batch, images, strict=True):
        padded[: image.shape[0], : image.shape[1]] = image
    sizes = torch.tensor([image.shape[:2] for image in images])
    return torch.from_numpy(batch).permute(0, 3, 1, 2), sizes


def normalise_padded(image: Tensor, sizes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise a batch of `pad_images`; its padding is zero afterwards too.

    Args:
        image: uint8 (B, C, H, W) in channels-last memory.
        sizes: int64 (B, 2), height and width of each image without its padding.
        mean: mean of each channel, for values from 0 to 1.
        std: standard deviation of each channel, for values from 0 to 1.

    Returns:
        float32 (B, C, H, W) in channels-last memory.
    """
    device, (height, width) = image.device, image.shape[2:]
    image = normalise(image, channel_values(tuple(mean), device), channel_values(tuple(std), device))
    rows = torch.arange(height, device=device) < sizes[:, :1]  # (B, H)
    columns = torch.arange(width, device=device) < sizes[:, 1:]  # (B, W)
    return image.mul_(rows[:, None, :, None] & columns[:, None, None, :])
