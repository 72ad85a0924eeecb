"""Scenes of digits on photos: the embedded data for detection and segmentation.

A scene is 256 x 320 px: a darkened crop of one of scikit-learn's two sample photos, with four to seven of its
handwritten digits. The digits are 48 to 128 px large (log-uniform), rotated by up to 10 degrees, in light colours, and
later digits cover earlier ones. No two splits share a digit or a part of a photo. A net with a million weights learns
to recognise the digits, pixel by pixel, within minutes on two cores.
"""

import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from pycocotools import mask as rle
from sklearn.datasets import load_sample_images

from datamodules.base import SPLITS
from datamodules.coco import Coco
from datamodules.digits import SIZE as DIGIT_SIZE
from datamodules.digits import Digits
from datamodules.mask_folder import MaskFolder
from retinue.utils.masks import IGNORED

logger = logging.getLogger(__name__)

# Version of the scenes that a seed makes; it is part of the folder's name in the user's cache.
VERSION = 2
# Number of scenes in each split.
COUNTS = {"train": 600, "val": 100, "test": 200}
# Height and width of a scene, in pixels.
SIZE = (256, 320)
# Minimum and maximum number of digits in a scene.
DIGIT_COUNTS = (4, 7)
# Minimum and maximum side of a digit's square, in pixels.
DIGIT_SIDES = (48, 128)
# Largest rotation of a digit, in degrees.
MAX_ANGLE = 10
# First column of the photos that a split uses, and the column after its last one.
PHOTO_COLUMNS = {"train": (0, 320), "val": (320, 480), "test": (480, 640)}
# Minimum and maximum width of the crop of a photo, in pixels.
CROP_WIDTHS = (112, 160)
# Smallest visible part of a digit, in pixels and as a share, from which the digit can be recognised.
MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE = 40, 0.25


class Scene(NamedTuple):
    """One image and its ground truth.

    Attributes:
        image: uint8 (H, W, 3).
        instances: uint8 (H, W), 0 for the background and i + 1 where digit i is visible.
        labels: int64 (N,), 0 to 9.
        unclear: bool (N,), whether the visible part of a digit is too small to recognise it.
    """

    image: np.ndarray
    instances: np.ndarray
    labels: np.ndarray
    unclear: np.ndarray


def make_scene(split: str, index: int, seed: int = 0) -> Scene:
    """Make the scene at a position of train, val or test; it depends on the arguments alone."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    photos, digits, labels = _source_images(split)
    image = _draw_background(rng, photos)
    chosen = rng.integers(len(digits), size=rng.integers(*DIGIT_COUNTS, endpoint=True))
    instances, digit_pixels = np.zeros(SIZE, np.uint8), np.empty(len(chosen))
    for i, digit in enumerate(digits[chosen]):
        shape = _draw_shape(rng, digit)
        top, left = (int(rng.integers(side - length)) for side, length in zip(SIZE, shape.shape, strict=True))
        window = slice(top, top + shape.shape[0]), slice(left, left + shape.shape[1])
        # image[window] and instances[window] are views, so both are changed in place.
        covered = image[window]
        covered += shape[..., None] * (_draw_colour(rng, covered) - covered)
        instances[window][shape > 0.5] = i + 1
        digit_pixels[i] = (shape > 0.5).sum()
    visible_pixels = np.bincount(instances.ravel(), minlength=len(chosen) + 1)[1:]
    unclear = (visible_pixels < MIN_VISIBLE_PIXELS) | (visible_pixels < MIN_VISIBLE_SHARE * digit_pixels)
    return Scene(np.clip(np.rint(image), 0, 255).astype(np.uint8), instances, labels[chosen], unclear)


@cache
def _source_images(split: str) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Return the split's parts of the photos, its digits (N, 40, 40) with a margin, and their labels (N,)."""
    left, right = PHOTO_COLUMNS[split]
    photos = [photo[:, left:right] for photo in load_sample_images().images]
    digits = Digits(image_size=DIGIT_SIZE, batch_size=1).images(split)
    # The margin is needed because the strokes of most digits end at the edge of the image.
    padded = np.pad(digits.images, ((0, 0), (4, 4), (4, 4)))
    blur = ImageFilter.GaussianBlur(1.5)
    return photos, np.stack([np.asarray(Image.fromarray(digit).filter(blur)) for digit in padded]), digits.labels


def _draw_background(rng: np.random.Generator, photos: list[np.ndarray]) -> np.ndarray:
    """Return a darkened and tinted crop of a photo in one of eight orientations: float64 (H, W, 3)."""
    photo = photos[rng.integers(len(photos))]
    photo = photo.transpose(1, 0, 2) if rng.random() < 0.5 else photo
    width = rng.uniform(*CROP_WIDTHS)
    height = width * SIZE[0] / SIZE[1]
    left, top = rng.uniform(0, photo.shape[1] - width), rng.uniform(0, photo.shape[0] - height)
    box = (left, top, left + width, top + height)
    image = np.asarray(Image.fromarray(photo).resize((SIZE[1], SIZE[0]), Image.Resampling.BICUBIC, box))
    return image[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))] * rng.uniform(0.25, 0.5, 3)


def _draw_shape(rng: np.random.Generator, digit: np.ndarray) -> np.ndarray:
    """Return the strokes of a digit, scaled, rotated and cut to their extent: (h, w), from 0 to 1."""
    side = round(math.exp(rng.uniform(*np.log(DIGIT_SIDES))))
    scaled = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    angle = rng.uniform(-MAX_ANGLE, MAX_ANGLE)
    rotated = np.asarray(scaled.rotate(angle, Image.Resampling.BICUBIC, expand=True))
    # The factor makes the edge of a stroke a few pixels wide.
    shape = np.clip((rotated / 255 - 0.37) * side / 8 + 0.5, 0, 1)
    rows, columns = np.flatnonzero(shape.any(axis=1)), np.flatnonzero(shape.any(axis=0))
    return shape[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _draw_colour(rng: np.random.Generator, covered: np.ndarray) -> np.ndarray:
    """Return a light colour that changes slightly from top to bottom, for the pixels (h, w, 3) to cover: (h, 1, 3)."""
    top = rng.uniform(130, 255, 3)
    bottom = np.clip(top + rng.uniform(-60, 60, 3), 130, 255)
    return np.linspace(top, bottom, len(covered))[:, None]


def semantic_mask(scene: Scene) -> np.ndarray:
    """Return the mask for segmentation, uint8 (H, W): 0 is background, d + 1 is digit d, 255 is an unclear digit."""
    values = np.where(scene.unclear, IGNORED, scene.labels + 1)
    return np.concatenate([[0], values]).astype(np.uint8)[scene.instances]


def coco_annotations(scene: Scene) -> list[dict]:
    """Return COCO's annotations of the visible digits, without ids.

    Masks are compressed run lengths. Unclear digits are crowds.
    """
    annotations = []
    for i, (label, unclear) in enumerate(zip(scene.labels.tolist(), scene.unclear.tolist(), strict=True), start=1):
        mask = np.asfortranarray(scene.instances == i, np.uint8)
        if not mask.any():
            continue
        code = rle.encode(mask)
        box, area = rle.toBbox(code).tolist(), int(rle.area(code))
        code["counts"] = code["counts"].decode()  # pyright: ignore[reportAttributeAccessIssue]: it is bytes
        annotations.append(
            {"category_id": label + 1, "segmentation": code, "bbox": box, "area": area, "iscrowd": int(unclear)}
        )
    return annotations


def write_scenes(out: Path, counts: Mapping[str, int], seed: int = 0) -> None:
    """Write scenes with both kinds of ground truth to the folder `out`, all of them or nothing.

    The files are images/<split>/*.jpg, annotations/instances_<split>.json (COCO's format) and masks/<split>/*.png (0 is
    the background). If another process makes the folder in the meantime, its folder is kept.

    Args:
        out: the folder, which should not exist.
        counts: number of scenes in each split.
        seed: seed of the scenes.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        temporary = Path(folder) / out.name
        for split, count in counts.items():
            _write_split(temporary, split, count, seed)
        try:
            temporary.rename(out)
        except OSError:
            # If the folder exists, another process has written it first.
            if not out.is_dir():
                raise


def _write_split(out: Path, split: str, count: int, seed: int) -> None:
    for folder in (f"images/{split}", f"masks/{split}", "annotations"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        scene = make_scene(split, index, seed)
        name = f"{index:05d}"
        Image.fromarray(scene.image).save(out / f"images/{split}/{name}.jpg", quality=95, subsampling=0)
        Image.fromarray(semantic_mask(scene)).save(out / f"masks/{split}/{name}.png")
        images.append({"id": index + 1, "file_name": f"{name}.jpg", "height": SIZE[0], "width": SIZE[1]})
        for annotation in coco_annotations(scene):
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1} | annotation)
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (out / f"annotations/instances_{split}.json").write_text(json.dumps(content))


def find_scenes() -> Path:
    """Return the folder of the scenes in the user's cache; the scenes are written if the folder does not exist.

    The cache is $XDG_CACHE_HOME, or ~/.cache if that variable is unset or empty.

    Raises:
        ValueError: if the scenes cannot be written.
    """
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(cache_home if cache_home else "~/.cache").expanduser() / "retinue" / f"scenes-{VERSION}"
    if not folder.is_dir():
        logger.warning("writing %d scenes to %s, once; this takes some seconds", sum(COUNTS.values()), folder)
        try:
            write_scenes(folder, COUNTS)
        except OSError as error:
            raise ValueError(
                f"the scenes cannot be written to {folder} ({error.strerror}): set XDG_CACHE_HOME to another folder, "
                "or data.root to a folder that scripts/make_scenes.py wrote"
            ) from error
    return folder


class Scenes(Coco):
    """Scenes with a box and a mask for each digit; without a root, the scenes of the user's cache (`find_scenes`)."""

    def __init__(self, **common: Any):
        paths = {}
        for split in SPLITS:
            paths[f"{split}_annotations"] = f"annotations/instances_{split}.json"
            paths[f"{split}_images"] = f"images/{split}"
        super().__init__(**paths, **common)

    def find_root(self, root: str | None) -> Path | None:
        return super().find_root(str(find_scenes()) if root is None else root)


class ScenesSegmentation(MaskFolder):
    """Scenes with a label for each pixel, the background or one of ten digits; without a root as `Scenes`."""

    def __init__(self, **common: Any):
        super().__init__(classes=("background", *"0123456789"), **common)

    def find_root(self, root: str | None) -> Path | None:
        return super().find_root(str(find_scenes()) if root is None else root)
