"""Scenes of digits on photos: the embedded data of detection and segmentation.

A scene is 256 x 320: a darkened crop of one of scikit-learn's two sample photos with four to seven of its digits on it,
48 to 128 px large (log-uniform), turned by up to 10 degrees, in light colours, the later ones over the earlier ones. No
split shares a digit, or a part of a photo, with another. A net of a million weights learns to tell them, pixel by
pixel, in minutes on two cores.
"""

import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from pycocotools import mask as rle
from sklearn.datasets import load_sample_images

from datamodules.base import SPLITS
from datamodules.coco import Coco
from datamodules.digits import SIZE as DIGIT
from datamodules.digits import Digits
from datamodules.mask_folder import MaskFolder

logger = logging.getLogger(__name__)

VERSION = 2  # of the scenes that a seed means; names the folder in the user's cache
COUNTS = {"train": 600, "val": 100, "test": 200}
SIZE = (256, 320)  # height, width
DIGITS = (4, 7)  # least and most of a scene
SIDES = (48, 128)  # of a digit's square, px
ANGLE = 10
COLUMNS = {"train": (0, 320), "val": (320, 480), "test": (480, 640)}  # of the photos
CROPS = (112, 160)  # width of what is cut out of a photo
LEAST_PIXELS, LEAST_SHARE = 40, 0.25  # of a digit to be seen, else it is unclear what it is


class Scene(NamedTuple):
    """One image and its truth.

    Attributes:
        image: uint8 (H, W, 3).
        instances: uint8 (H, W), 0 for the background, i + 1 where digit i is seen.
        labels: int64 (N,), 0 to 9.
        unclear: bool (N,), whether too little of a digit is seen to tell what it is.
    """

    image: np.ndarray
    instances: np.ndarray
    labels: np.ndarray
    unclear: np.ndarray


def make_scene(split: str, index: int, seed: int = 0) -> Scene:
    """The scene at a position of train, val or test; it follows from the arguments alone."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    photos, digits, labels = _materials(split)
    image = _background(rng, photos)
    chosen = rng.integers(len(digits), size=rng.integers(DIGITS[0], DIGITS[1], endpoint=True))
    instances, whole = np.zeros(SIZE, np.uint8), np.empty(len(chosen))
    for i, digit in enumerate(digits[chosen]):
        shape = _sprite(rng, digit)
        top, left = (int(rng.integers(side - length)) for side, length in zip(SIZE, shape.shape, strict=True))
        inside = slice(top, top + shape.shape[0]), slice(left, left + shape.shape[1])
        under = image[inside]  # a view, as is instances[inside]
        under += shape[..., None] * (_paint(rng, under) - under)
        instances[inside][shape > 0.5] = i + 1
        whole[i] = (shape > 0.5).sum()
    seen = np.bincount(instances.ravel(), minlength=len(chosen) + 1)[1:]
    unclear = (seen < LEAST_PIXELS) | (seen < LEAST_SHARE * whole)
    return Scene(np.clip(np.rint(image), 0, 255).astype(np.uint8), instances, labels[chosen], unclear)


@cache
def _materials(split: str) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The split's parts of the photos, its digits (N, 40, 40) with a margin, and their labels."""
    left, right = COLUMNS[split]
    photos = [photo[:, left:right] for photo in load_sample_images().images]
    digits = Digits(image_size=DIGIT, batch_size=1).images(split)
    padded = np.pad(digits.images, ((0, 0), (4, 4), (4, 4)))
    rounded = ImageFilter.GaussianBlur(1.5)  # strokes end at the edge of most digits
    return photos, np.stack([np.asarray(Image.fromarray(d).filter(rounded)) for d in padded]), digits.labels


def _background(rng: np.random.Generator, photos: list[np.ndarray]) -> np.ndarray:
    """float64 (H, W, 3): a crop of a photo, darkened, in one of eight orientations and with a tint."""
    photo = photos[rng.integers(len(photos))]
    photo = photo.transpose(1, 0, 2) if rng.random() < 0.5 else photo
    width = rng.uniform(*CROPS)
    height = width * SIZE[0] / SIZE[1]
    left, top = rng.uniform(0, photo.shape[1] - width), rng.uniform(0, photo.shape[0] - height)
    box = (left, top, left + width, top + height)
    image = np.asarray(Image.fromarray(photo).resize((SIZE[1], SIZE[0]), Image.Resampling.BICUBIC, box))
    return image[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))] * rng.uniform(0.25, 0.5, 3)


def _sprite(rng: np.random.Generator, digit: np.ndarray) -> np.ndarray:
    """(h, w), from 0 to 1: a digit's strokes, scaled and turned, cut to what is not 0."""
    side = round(math.exp(rng.uniform(*np.log(SIDES))))
    large = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    turned = np.asarray(large.rotate(rng.uniform(-ANGLE, ANGLE), Image.Resampling.BICUBIC, expand=True))
    shape = np.clip((turned / 255 - 0.37) * side / 8 + 0.5, 0, 1)  # an edge is some pixels wide
    rows, columns = np.flatnonzero(shape.any(axis=1)), np.flatnonzero(shape.any(axis=0))
    return shape[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _paint(rng: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """(h, 1, 3): a light colour that changes a little from top to bottom."""
    top = rng.uniform(130, 255, 3)
    bottom = np.clip(top + rng.uniform(-60, 60, 3), 130, 255)
    return np.linspace(top, bottom, len(under))[:, None]


def semantic_mask(scene: Scene) -> np.ndarray:
    """uint8 (H, W): 0 is the background, 1 + d a digit d, 255 one of which it is unclear."""
    values = np.where(scene.unclear, 255, scene.labels + 1)
    return np.concatenate([[0], values]).astype(np.uint8)[scene.instances]


def coco_annotations(scene: Scene) -> list[dict]:
    """The digits that are seen, as COCO has them, without ids: masks in compressed RLE, unclear ones as crowds."""
    annotations = []
    for i, (label, unclear) in enumerate(zip(scene.labels.tolist(), scene.unclear.tolist(), strict=True), start=1):
        mask = np.asfortranarray(scene.instances == i, np.uint8)
        if not mask.any():
            continue
        code = rle.encode(mask)
        box, area = rle.toBbox(code).tolist(), int(rle.area(code))
        code["counts"] = code["counts"].decode()  # pyright: ignore[reportAttributeAccessIssue]: it is bytes
        own = {"segmentation": code, "bbox": box, "area": area, "iscrowd": int(unclear)}
        annotations.append({"category_id": label + 1} | own)
    return annotations


def write_scenes(out: Path, counts: Mapping[str, int], seed: int = 0) -> None:
    """Write images and both kinds of truth to the folder `out`, whole or not at all; where it is there, it is kept.

    images/<split>/*.jpg, annotations/instances_<split>.json (COCO) and masks/<split>/*.png (0 for the background).
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        unfinished = Path(folder) / out.name
        for split, count in counts.items():
            _write_split(unfinished, split, count, seed)
        try:
            unfinished.rename(out)
        except OSError:
            if not out.is_dir():  # else another process was first
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
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (out / f"annotations/instances_{split}.json").write_text(json.dumps(truth))


def find_scenes() -> Path:
    """The folder in the user's cache that has the scenes, which are written when it is not there.

    Raises:
        ValueError: they cannot be.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "retinue" / f"scenes-{VERSION}"
    if not folder.is_dir():
        logger.warning("writing %d scenes to %s: some seconds, this once", sum(COUNTS.values()), folder)
        try:
            write_scenes(folder, COUNTS)
        except OSError as error:
            raise ValueError(
                f"the scenes cannot be written to {folder} ({error.strerror}): set XDG_CACHE_HOME to another folder, "
                "or data.root to one that scripts/make_scenes.py wrote"
            ) from error
    return folder


class Scenes(Coco):
    """Scenes with a box and a mask for each digit. Without a root they are written to the user's cache."""

    def __init__(self, **common):
        paths = {}
        for split in SPLITS:
            paths[f"{split}_annotations"] = f"annotations/instances_{split}.json"
            paths[f"{split}_images"] = f"images/{split}"
        super().__init__(**paths, **common)

    def find_root(self, root: str | None) -> Path | None:
        return super().find_root(str(find_scenes()) if root is None else root)


class ScenesSegmentation(MaskFolder):
    """Scenes with a class for each pixel: the background and the ten digits. Without a root, as `Scenes`."""

    def __init__(self, **common):
        super().__init__(classes=("background", *"0123456789"), **common)

    def find_root(self, root: str | None) -> Path | None:
        return super().find_root(str(find_scenes()) if root is None else root)
