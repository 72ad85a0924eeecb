"""Geometry and colour for detection and segmentation: whatever a sample has of an image, boxes and masks, together.

A sample's `image` is uint8 (H, W, 3); with it may come `boxes` float32 (N, 4) (x1, y1, x2, y2 in pixels) with `labels`
(N,) and `masks` uint8 (N, H, W); `ignored` float32 (M, 4); and `mask` uint8 (H, W), the classes of the pixels.

The augmentations are those of mmdetection's and mmsegmentation's recipes: multi-scale resizing and cropping as in DETR
(arXiv:2005.12872, section 4), large-scale jitter (arXiv:2012.07177, section 3), random scaling and cropping as for
ADE20K, and SSD's photometric distortion (arXiv:1512.02325, section 2.2). A crop is taken from the original image, where
it stands for what would be cut from the scaled one, so that an image is resized once and by no more than is kept.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.batch import normalise
from datamodules.transforms import known_fields, resize
from retinue.utils.masks import IGNORED

DETR_SIZES = ((400, 4200), (500, 4200), (600, 4200))  # before DETR's crop; its longer side has no limit
DETR_CROP = (384, 600)  # least and most of its sides
CROP_TRIES = 10  # for one that is not of one class
SMALLEST = 0.01  # px; what is narrower after the geometry is gone

Size = tuple[int, int]  # height, width
Window = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True, kw_only=True)
class DenseAugment:
    """A recipe's augmentation for detection and segmentation: all of its `augment` section. What is not named is off.

    Attributes:
        sizes: [short, long] limits of the sides, of which one is drawn an image. None: the data's image size.
        ratio: [least, most] of a random factor on the one size.
        crop: [height, width] of a random crop; smaller images are taken whole.
        cat_max_ratio: share of a crop that one class may have, where ten tries can do that; for segmentation.
        detr_crop: half of the images are cropped first, to sides of 384 to 600 px at a shorter side of 400, 500 or 600.
        hflip: probability of mirroring.
        photometric: change brightness, contrast, saturation and hue.
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
        """Raises: ValueError: a key is unknown or a value out of its range."""
        values = known_fields(cls, config)
        if (sizes := values.get("sizes")) is not None:
            what = "one or more pairs [short, long]"
            sizes = sizes if isinstance(sizes, Sequence) else [sizes]
            values["sizes"] = tuple(_pair(size, "sizes", what) for size in sizes)
        for key, what in (("ratio", "[least, most]"), ("crop", "[height, width]")):
            if values.get(key) is not None:
                values[key] = _pair(values[key], key, what)
        augment = cls(**values)
        augment._check()
        return augment

    def _check(self) -> None:
        def expect(right: bool, key: str, what: str) -> None:
            if not right:
                raise ValueError(f"augment.{key} must be {what}, not {getattr(self, key)!r}")

        sizes, ratio, share = self.sizes, self.ratio, self.cat_max_ratio
        if sizes is not None:
            ordered = len(sizes) > 0 and all(0 < short <= long for short, long in sizes)
            expect(ordered, "sizes", "one or more pairs [short, long] with 0 < short <= long")
        expect(ratio is None or 0 < ratio[0] <= ratio[1], "ratio", "[least, most] with 0 < least <= most")
        expect(ratio is None or len(sizes or ((),)) == 1, "sizes", "one pair where augment.ratio is set")
        expect(self.crop is None or min(self.crop) > 0, "crop", "[height, width] in pixels")
        expect(share is None or 0 < share <= 1, "cat_max_ratio", "above 0 and at most 1")
        expect(share is None or self.crop is not None, "cat_max_ratio", "null where augment.crop is")
        expect(0 <= self.hflip <= 1, "hflip", "from 0 to 1")


def _pair(value: Any, key: str, what: str) -> tuple:
    right = isinstance(value, Sequence) and len(value) == 2 and all(isinstance(side, int | float) for side in value)
    if not right:
        raise ValueError(f"augment.{key} must be {what}, not {value!r}")
    return tuple(value)


def check_limits(image_size: Any) -> Sequence[int]:
    """`image_size`, if it is [short, long].

    Raises:
        ValueError: it is not.
    """
    pair = isinstance(image_size, Sequence) and len(image_size) == 2 and all(isinstance(s, int) for s in image_size)
    if not (pair and 0 < image_size[0] <= image_size[1]):
        raise ValueError(f"data.image_size must be [short, long] with 0 < short <= long, not {image_size!r}")
    return image_size


def fit(size: Size, limits: Sequence[float]) -> Size:
    """`size` scaled with its ratio kept so that its shorter side is at most limits[0], its longer at most limits[1]."""
    factor = min(limits[0] / min(size), limits[1] / max(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


class DenseTrainTransform:
    """Crop, resize, mirror, recolour; draws from Python's global generator.

    Args:
        image_size: [short, long], where the augmentation names no sizes.
    """

    def __init__(self, augment: DenseAugment, image_size: Size):
        self.augment = augment
        self.sizes = augment.sizes or (image_size,)

    def __call__(self, sample: dict) -> dict:
        augment = self.augment
        height, width = sample["image"].shape[:2]
        window = (0, 0, height, width)
        if augment.detr_crop and random.random() < 0.5:
            scaled = fit((height, width), random.choice(DETR_SIZES))
            sides = [random.randint(*(min(limit, side) for limit in DETR_CROP)) for side in scaled]
            window = draw_window(window, scaled, (sides[0], sides[1]))
        factor = random.uniform(*augment.ratio) if augment.ratio else 1.0
        size = fit(window[2:], [int(limit * factor) for limit in random.choice(self.sizes)])
        if augment.crop:
            crop = min(augment.crop[0], size[0]), min(augment.crop[1], size[1])
            window, size = self._crop(window, size, crop, sample.get("mask")), crop
        sample = reframe(sample, window, size, random.random() < augment.hflip)
        return sample | {"image": distort(sample["image"])} if augment.photometric else sample

    def _crop(self, window: Window, scaled: Size, size: Size, mask: np.ndarray | None) -> Window:
        most = self.augment.cat_max_ratio
        part = draw_window(window, scaled, size)
        if mask is None or most is None:
            return part
        for _ in range(CROP_TRIES - 1):
            top, left, height, width = part
            count = np.bincount(mask[top : top + height, left : left + width].ravel(), minlength=256)[:IGNORED]
            if 0 < count.max() < most * count.sum():
                break
            part = draw_window(window, scaled, size)
        return part


class DenseEvalTransform:
    """Resize an image into [short, long], without antialiasing as mmdetection and mmsegmentation do.

    `original_size` is what it was, int64 (2,). A `mask` stays as it is.
    """

    def __init__(self, image_size: Size):
        self.image_size = image_size

    def __call__(self, sample: dict) -> dict:
        image = sample["image"]
        resized = resize(image, fit(image.shape[:2], self.image_size), "bilinear", antialias=False)
        return sample | {"image": resized, "original_size": np.array(image.shape[:2])}


def draw_window(window: Window, scaled: Size, size: Size) -> Window:
    """A random part of `window`: what a crop of `size` would be were the window resized to `scaled`."""
    top, left, *sides = window
    inner = [max(1, round(side * part / whole)) for side, part, whole in zip(sides, size, scaled, strict=True)]
    top += random.randint(0, sides[0] - inner[0])
    left += random.randint(0, sides[1] - inner[1])
    return top, left, inner[0], inner[1]


def reframe(sample: dict, window: Window, size: Size, flip: bool = False) -> dict:
    """Cut `window` out of a sample, resize it to `size` and mirror it.

    Boxes are clipped; a box that the window cuts is the tight one around what is left of its mask, where there are
    masks. Objects of which nothing is left are dropped. Classes outside the window are lost, not padded.
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
        out["ignored"] = ignored[_visible(ignored)]
    if "boxes" in sample:
        boxes, cut = _move_boxes(sample["boxes"], window, size, flip)
        keep = _visible(boxes)
        if "masks" in sample and cut.any():
            left_over = np.any(out["masks"], axis=(1, 2))
            boxes[cut] = tight_boxes(out["masks"][cut])
            keep &= left_over | ~cut
        out["boxes"] = boxes[keep]
        for key in ("labels", "masks"):
            if key in sample and not keep.all():
                out[key] = out[key][keep]
    return out


def _move_boxes(boxes: np.ndarray, window: Window, size: Size, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """The boxes (N, 4) in the new frame, clipped to it, and which of them (N,) the window cuts."""
    top, left, height, width = window
    x, y = boxes[:, 0::2] - np.float32(left), boxes[:, 1::2] - np.float32(top)
    cut = np.any((x < 0) | (x > width) | (y < 0) | (y > height), axis=1)
    x = (x * np.float32(size[1] / width)).clip(0, size[1])
    y = (y * np.float32(size[0] / height)).clip(0, size[0])
    if flip:
        x = size[1] - x[:, ::-1]
    return np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1), cut


def _visible(boxes: np.ndarray) -> np.ndarray:
    return np.all(boxes[:, 2:] - boxes[:, :2] > SMALLEST, axis=1)


def tight_boxes(masks: np.ndarray) -> np.ndarray:
    """The boxes, float32 (N, 4), around what is not zero in `masks` (N, H, W); zeros where there is nothing."""
    sides = []
    for axis in (1, 2):
        marked = np.any(masks, axis=axis)  # (N, W), (N, H)
        first, end = marked.argmax(1), marked.shape[1] - marked[:, ::-1].argmax(1)
        sides.append((first, np.where(marked.any(1), end, 0)))
    (x1, x2), (y1, y2) = sides
    return np.stack([x1, y1, x2, y2], axis=1).astype(np.float32)


def _resize_masks(masks: np.ndarray, size: Size) -> np.ndarray:
    """uint8 (..., H, W) → (..., h, w), each pixel that of the nearest centre; a third of torch's time."""
    for axis in (-1, -2):
        side, length = masks.shape[axis], size[axis]
        if side != length:
            masks = masks.take(((np.arange(length) + 0.5) * (side / length)).astype(np.int64), axis)
    return masks


def _mirror(array: np.ndarray, axis: int, flip: bool) -> np.ndarray:
    """torch's flip takes a small part of the time of copying NumPy's reversed view."""
    return torch.from_numpy(np.ascontiguousarray(array)).flip(axis).numpy() if flip else array


def distort(image: np.ndarray) -> np.ndarray:
    """SSD's photometric distortion: each of brightness (by up to 32 of 255), contrast (0.5 to 1.5; before the colours
    or after them), saturation (0.5 to 1.5) and hue (by up to 18 degrees of OpenCV's 180) with a probability of 0.5."""
    shift = random.uniform(-32, 32) if random.random() < 0.5 else 0.0
    contrast = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    contrast_first = random.random() < 0.5
    saturation = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    turn = random.uniform(-0.1, 0.1) if random.random() < 0.5 else 0.0  # of a full circle

    values = np.arange(256)
    levels = (values + shift).clip(0, 255) * (contrast if contrast_first else 1.0)
    image = _look_up(levels, image)
    if saturation != 1 or turn:
        colours = np.array(Image.fromarray(image).convert("HSV"))
        colours[..., 0] = ((values + round(256 * turn)) % 256).astype(np.uint8)[colours[..., 0]]
        colours[..., 1] = _look_up(values * saturation, colours[..., 1])
        height, width = image.shape[:2]
        image = np.asarray(Image.frombytes("HSV", (width, height), colours.tobytes()).convert("RGB"))
    return image if contrast_first else _look_up(values * contrast, image)


def _look_up(levels: np.ndarray, image: np.ndarray) -> np.ndarray:
    table = levels.round().clip(0, 255).astype(np.uint8)
    return image if np.array_equal(table, np.arange(256)) else table[image]


def pad_images(images: Sequence[np.ndarray], size: Size) -> tuple[Tensor, Tensor]:
    """uint8 (h, w, 3) each → uint8 (B, 3, *size) in channels-last memory, padded at the right and the bottom with
    zeros; and their sizes (h, w), int64 (B, 2)."""
    batch = np.zeros((len(images), *size, 3), np.uint8)
    for place, image in zip(batch, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    sizes = torch.tensor([image.shape[:2] for image in images])
    return torch.from_numpy(batch).permute(0, 3, 1, 2), sizes


def normalise_padded(image: Tensor, sizes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """As `normalise`, for what `pad_images` gives: the padding is zero afterwards too."""
    device, (height, width) = image.device, image.shape[2:]
    image = normalise(image, torch.tensor(mean, device=device), torch.tensor(std, device=device))
    rows = torch.arange(height, device=device) < sizes[:, :1]  # (B, H)
    columns = torch.arange(width, device=device) < sizes[:, 1:]  # (B, W)
    return image.mul_(rows[:, None, :, None] & columns[:, None, None, :])
