"""Images with boxes, and with instance masks where there are any."""

import logging
import os
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.coco_format import CocoIndex
from datamodules.dense import DenseData
from datamodules.dense_transforms import normalise_padded, pad_images
from datamodules.images import EncodedImages

logger = logging.getLogger(__name__)

DIVISOR = 32  # of a batch's height and width


class DetectionImages(EncodedImages):
    """The images of a set, by position; in training with their objects, in evaluation alone.

    A training sample is {"image": uint8 (H, W, 3), "boxes": float32 (N, 4), "labels": int64 (N,), "ignored": float32
    (M, 4), and, with `masks`, "masks": uint8 (N, H, W)}. Crowds are `ignored`; boxes are clipped to the image, and
    those of which less than 1 px is inside are left out.

    Args:
        folder: what the index's file names are relative to.
    """

    def __init__(self, index: CocoIndex, folder: Path, *, training: bool = False, masks: bool = False):
        self.index, self.folder = index, os.fspath(folder)
        self.training, self.masks = training, masks

    @property
    def ids(self) -> np.ndarray:
        """(N,) the image ids, by position."""
        return self.index.ids

    @cached_property
    def truth(self) -> dict[str, list[dict]]:
        """`images`, `annotations` and `categories` as a COCO file has them."""
        return self.index.to_coco()

    @property
    def blank(self) -> dict:
        return {"image": np.zeros((DIVISOR, DIVISOR, 3), np.uint8)}

    def __len__(self) -> int:
        return len(self.index.ids)

    def __getitem__(self, index: int) -> dict:
        image = self.image(index)
        if list(image.shape[:2]) != self.index.sizes[index].tolist():
            (height, width), (h, w) = image.shape[:2], self.index.sizes[index]
            raise ValueError(f"{self.name(index)} is {width} x {height} px, but {w} x {h} in {self.index.source}")
        return {"image": image, **self._objects(index)} if self.training else {"image": image}

    def _objects(self, index: int) -> dict[str, np.ndarray]:
        start, end = self.index.starts[index : index + 2]
        rows = np.arange(start, end)[~self.index.degenerate[start:end]]
        crowd = self.index.crowd[rows]
        one = rows[~crowd]
        objects = {
            "boxes": self.index.corners[one],
            "labels": self.index.labels[one],
            "ignored": self.index.corners[rows[crowd]],
        }
        return objects | {"masks": self.index.masks(index, one)} if self.masks else objects

    def read(self, index: int) -> bytes:
        with open(os.path.join(self.folder, self.name(index)), "rb") as file:
            return file.read()

    def name(self, index: int) -> str:
        return self.index.files[index].decode()


def collate(samples: Sequence[dict]) -> dict:
    """Images padded to one size, uint8 (B, 3, H, W) with their `sizes` (B, 2); what differs in length as lists."""
    height, width = (max(sample["image"].shape[axis] for sample in samples) for axis in (0, 1))
    padded = -(-height // DIVISOR) * DIVISOR, -(-width // DIVISOR) * DIVISOR
    batch: dict[str, Any] = {}
    batch["image"], batch["sizes"] = pad_images([sample["image"] for sample in samples], padded)
    batch["index"] = torch.tensor([int(sample["index"]) for sample in samples])
    if "original_size" in samples[0]:
        batch["original_sizes"] = torch.from_numpy(np.stack([sample["original_size"] for sample in samples]))
    for key in ("boxes", "labels", "masks", "ignored"):
        if key in samples[0]:
            batch[key] = [torch.from_numpy(np.ascontiguousarray(sample[key])) for sample in samples]
    return batch


class DetectionData(DenseData):
    """Images with boxes and perhaps masks; labels are from 0 up in the order of `class_names`.

    A batch has `image`, float32 (B, 3, H, W), normalised once it is on the device and padded with zeros at the right
    and the bottom to multiples of 32, and `sizes`, int64 (B, 2), heights and widths without the padding. In training it
    has lists with one tensor an image: `boxes`, float32 (N, 4), x1, y1, x2, y2 in pixels of the resized image; `labels`
    (N,); `ignored`, float32 (M, 4), boxes of crowds; and, where the data have masks that are read, `masks`, uint8
    (N, h, w). In evaluation it has `original_sizes`, int64 (B, 2), those of the files.

    Args:
        keep_empty: train on images without objects too.
        read_masks: give training batches the instance masks that the data have. A detector of boxes alone does not
            need them, and reading them takes time.
        common: arguments of `DenseData`.
    """

    collate = staticmethod(collate)

    def __init__(self, *, keep_empty: bool = False, read_masks: bool = True, **common: Any):
        super().__init__(**common)
        self.keep_empty, self.read_masks = keep_empty, read_masks

    @abstractmethod
    def read(self, split: str) -> tuple[CocoIndex, Path]:
        """A split's annotations, and the folder that their file names are relative to."""

    def load(self, split: str) -> DetectionImages:
        index, folder = self.read(split)
        check_files(index, folder)
        if split == "val":
            return DetectionImages(index, folder)
        _check_same_categories(index, self._val)
        if self.has_masks and index.segmentations is None:
            raise ValueError(f"{self._val.source} has masks, but not all annotations of {index.source} have one")
        return DetectionImages(index, folder) if split == "test" else self._training_images(index, folder)

    def _training_images(self, index: CocoIndex, folder: Path) -> DetectionImages:
        if dropped := int(index.degenerate.sum()):
            few = f"{dropped} of {len(index.boxes)} boxes have less than 1 px inside their image and are left out"
            logger.warning("%s: %s", index.source, few)
        used = np.bincount(index.image, ~(index.degenerate | index.crowd), minlength=len(index.ids)) > 0
        if not used.any():
            raise ValueError(f"{index.source} has no box to train on: all are crowds, or outside their images")
        if not (self.keep_empty or used.all()):
            logger.info("%s: %d of %d images have no objects", index.source, (~used).sum(), len(used))
            index = index.select(used)
        return DetectionImages(index, folder, training=True, masks=self.has_masks and self.read_masks)

    def groups(self, images: DetectionImages) -> np.ndarray:
        """Upright images or not: a batch of both would be padded to the height of one and the width of the other."""
        height, width = images.index.sizes.T
        return height > width

    @property
    def _val(self) -> CocoIndex:
        return self.images("val").index

    @property
    def class_names(self) -> Sequence[str]:
        return list(self._val.categories.values())

    @property
    def category_ids(self) -> list[int]:
        """The data's own ids of the classes, by label."""
        return list(self._val.categories)

    @property
    def has_masks(self) -> bool:
        return self._val.segmentations is not None

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        return batch | {"image": normalise_padded(batch["image"], batch["sizes"], self.mean, self.std)}


def check_files(index: CocoIndex, folder: Path) -> None:
    """Raises ValueError where an image of the set has no file. Each folder is listed once, no file is looked at."""
    names = [file.decode() for file in index.files]
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        inside, file = os.path.split(name)
        if inside not in listed:
            where = folder / inside
            listed[inside] = set(os.listdir(where)) if where.is_dir() else set()
        if file not in listed[inside]:
            missing.append(name)
    if missing:
        some = f"{len(missing)} of {len(names)} images of {index.source} are missing"
        raise ValueError(f"{some}, like {folder / missing[0]}")


def _check_same_categories(index: CocoIndex, other: CocoIndex) -> None:
    if index.categories != other.categories:
        id, name = min(set(index.categories.items()) ^ set(other.categories.items()))
        here, there = (index, other) if (id, name) in index.categories.items() else (other, index)
        raise ValueError(f"category {id}, {name!r}, of {here.source} is not in {there.source}")
