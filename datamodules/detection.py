"""Images with boxes and possibly instance masks: base class of every detection data set, and the images it loads."""

import logging
import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_only

from datamodules.coco_format import CocoIndex
from datamodules.decode import BrokenImage, read_file, read_size
from datamodules.dense_prediction import DensePredictionData
from datamodules.dense_transforms import normalise_padded, pad_images
from datamodules.images import EncodedImages, draw_shots
from datamodules.split_checks import check_labels
from retinue.utils.arithmetic import round_up
from retinue.utils.suggestions import nearest

logger = logging.getLogger(__name__)
# Every process of a run reads the data, so only the first one says what it finds.
warn = rank_zero_only(logger.warning)

# A batch's height and width are multiples of this number of pixels.
SIZE_DIVISOR = 32


class DetectionImages(EncodedImages):
    """Images of a data set, read by position; training samples have objects, evaluation samples only the image.

    A training sample is {"image": uint8 (H, W, 3), "boxes": float32 (N, 4), "labels": int64 (N,), "ignored": float32
    (M, 4)} and, with `masks`, "masks": uint8 (N, H, W). `ignored` holds the boxes of crowds and, with `masks`, of
    objects whose mask has no pixel. Boxes are clipped to the image; unused annotations and boxes with less than 1 px of
    their width or height inside are left out.

    Args:
        index: annotations of the images.
        folder: folder that the index's file names are relative to.
        training: whether samples have objects.
        masks: whether training samples have masks.

    Raises:
        ValueError: if an image has another size than its annotations say; raised when the sample is read.
    """

    def __init__(self, index: CocoIndex, folder: Path, *, training: bool = False, masks: bool = False):
        self.index, self.folder = index, os.fspath(folder)
        self.training, self.masks = training, masks

    @property
    def ids(self) -> np.ndarray:
        """Image ids (N,), by position."""
        return self.index.ids

    @cached_property
    def truth(self) -> dict[str, list[dict]]:
        """Ground truth: `images`, `annotations` and `categories` in COCO's format."""
        return self.index.to_coco()

    @property
    def blank(self) -> dict:
        """Sample that stands for padding, in evaluation only."""
        return {"image": np.zeros((SIZE_DIVISOR, SIZE_DIVISOR, 3), np.uint8)}

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
        left_out = self.index.degenerate[start:end] | self.index.unused[start:end]
        rows = np.arange(start, end)[~left_out]
        ignored = self.index.crowd[rows]
        masks = None
        if self.masks:
            masks = self.index.masks(index, rows[~ignored])
            has_pixels = masks.any((1, 2))
            masks = masks[has_pixels]
            ignored[np.flatnonzero(~ignored)[~has_pixels]] = True
        objects = {
            "boxes": self.index.corners[rows[~ignored]],
            "labels": self.index.labels[rows[~ignored]],
            "ignored": self.index.corners[rows[ignored]],
        }
        return objects if masks is None else objects | {"masks": masks}

    def read(self, index: int) -> bytes:
        return read_file(os.path.join(self.folder, self.name(index)))

    def name(self, index: int) -> str:
        return self.index.files[index].decode()


def collate(samples: Sequence[dict]) -> dict:
    """Join samples to one batch of bytes.

    Args:
        samples: transformed samples of training or of evaluation.

    Returns:
        The batch of `datamodules.batch` before normalising: `image` is uint8 (B, 3, H, W), padded to a common size with
        sides that are multiples of 32; keys whose length differs between images are lists.
    """
    height, width = (max(sample["image"].shape[axis] for sample in samples) for axis in (0, 1))
    padded = round_up(height, SIZE_DIVISOR), round_up(width, SIZE_DIVISOR)
    batch: dict[str, Any] = {}
    batch["image"], batch["sizes"] = pad_images([sample["image"] for sample in samples], padded)
    batch["index"] = torch.tensor([int(sample["index"]) for sample in samples])
    if "original_size" in samples[0]:
        batch["original_sizes"] = torch.from_numpy(np.stack([sample["original_size"] for sample in samples]))
    for key in ("boxes", "labels", "masks", "ignored"):
        if key in samples[0]:
            batch[key] = [torch.from_numpy(np.ascontiguousarray(sample[key])) for sample in samples]
    return batch


class DetectionData(DensePredictionData):
    """Images with boxes and possibly masks; labels are 0 to K - 1 in the order of `class_names`.

    The module docstring of `datamodules.batch` specifies the batches.

    Args:
        keep_empty: whether images without objects are trained on too.
        read_masks: whether training samples have the instance masks of the data, if there are any. A detector that
            predicts only boxes needs no masks, and decoding them takes time.
        shots: number of objects of each class to train on, drawn by the seed; the others are ignored like crowds, and
            images without a drawn object are left out. None trains on all objects.
        common: arguments of `DensePredictionData`.
    """

    collate = staticmethod(collate)

    def __init__(self, *, keep_empty: bool = False, read_masks: bool = True, shots: int | None = None, **common: Any):
        super().__init__(**common)
        if shots is not None and shots < 1:
            raise ValueError(f"data.shots must be at least 1, or null for all objects, not {shots!r}")
        if shots is not None and keep_empty:
            raise ValueError("data.shots leaves out images without a drawn object, so data.keep_empty must be false")
        self.keep_empty, self.read_masks, self.shots = keep_empty, read_masks, shots

    @abstractmethod
    def read(self, split: str) -> tuple[CocoIndex, Path]:
        """Return a split's annotations, and the folder that their file names are relative to."""

    def sets(self, split: str) -> dict[str, range]:
        """Return the positions of the images of each set that a split joins, by name; none if the split is one set."""
        return {}

    def load(self, split: str) -> DetectionImages:
        index, folder = self.read(split)
        check_files(index, folder)
        if split == "val":
            return DetectionImages(index, folder)
        check_same_categories(index, self._val_index)
        if self.has_masks and index.segmentations is None:
            raise ValueError(f"{self._val_index.source} has masks, but annotations of {index.source} have none")
        return DetectionImages(index, folder) if split == "test" else self._training_images(index, folder)

    def _training_images(self, index: CocoIndex, folder: Path) -> DetectionImages:
        if dropped := int(index.degenerate.sum()):
            message = f"{dropped} of {len(index.boxes)} boxes have less than 1 px inside their image and are left out"
            warn("%s: %s", index.source, message)
        if unused := int((index.unused & ~index.degenerate).sum()):
            warn("%s: %d annotations with `ignore` or without an area are left out", index.source, unused)
        masks = self.has_masks and self.read_masks
        maskless = index.maskless & masks & ~(index.degenerate | index.unused | index.crowd)
        if maskless.any():
            message = "%s: %d of %d objects have an empty mask or no polygon with three corners, and are ignored"
            warn(message, index.source, maskless.sum(), len(index.boxes))
        is_object = ~(index.degenerate | index.unused | index.crowd | maskless)
        if self.shots is not None:
            drawn = draw_shots(index.labels, is_object, self.shots, self.seed)
            index = replace(index, crowd=index.crowd | (is_object & ~drawn))
            is_object = drawn
        has_objects = np.bincount(index.image_index, is_object, minlength=len(index.ids)) > 0
        if not has_objects.any():
            raise ValueError(f"{index.source} has no box to train on: all are crowds, ignored, or outside their images")
        if not (self.keep_empty or has_objects.all()):
            logger.info("%s: %d of %d images have no objects", index.source, (~has_objects).sum(), len(has_objects))
            index = index.select(has_objects)
        return DetectionImages(index, folder, training=True, masks=masks)

    def check(self, images: DetectionImages, split: str) -> None:
        check_labels(self.image_classes(images)[1], self.class_names, split)

    def image_classes(self, images: DetectionImages) -> tuple[np.ndarray, np.ndarray]:
        index = images.index
        is_object = ~(index.degenerate | index.unused | index.crowd)
        return index.image_index[is_object], index.labels[is_object]

    def groups(self, images: DetectionImages) -> np.ndarray:
        """Return whether each image is in portrait format.

        A batch of portrait and landscape images would be padded to the height of the former and the width of the
        latter.
        """
        height, width = images.index.sizes.T
        return height > width

    @property
    def _val_index(self) -> CocoIndex:
        return self.images("val").index

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, by label."""
        return list(self._val_index.categories.values())

    @property
    def category_ids(self) -> list[int]:
        """Ids that the data use for the classes, by label."""
        return list(self._val_index.categories)

    @property
    def class_ids(self) -> list[int]:
        return self.category_ids

    @property
    def has_masks(self) -> bool:
        """True if the annotations of the validation split have masks."""
        return self._val_index.segmentations is not None

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        return batch | {"image": normalise_padded(batch["image"], batch["sizes"], self.mean, self.std)}


def check_classes(classes: Any) -> list[str] | None:
    """Return the argument `classes` of a data set after checking that it is a list of different names, or None.

    Raises:
        ValueError: if it is not.
    """
    if classes is None:
        return None
    names = [str(name) for name in classes] if isinstance(classes, list | tuple) else []
    if not names:
        like = classes if isinstance(classes, str) else "cat,dog"
        raise ValueError(f"data.classes must be a list of names, like [{like}], not {classes!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"data.classes names {max(names, key=names.count)!r} twice")
    return names


def choose_names(classes: list[str] | None, found: Iterable[str]) -> list[str]:
    """Return the names of the classes by label: `classes`, or without them the names in the training data, sorted.

    Raises:
        ValueError: if a name in `classes` is not in the training data and seems to be mistyped.
    """
    names = sorted(set(found))
    for name in set(classes or ()).difference(names):
        # A class may lack training images, but here the name is probably mistyped.
        if hint := nearest(name, set(names).difference(classes or ())):
            raise ValueError(f"data.classes has {name!r}, which no training image has.{hint}")
    return classes or names


def image_entry(position: int, folder: Path, name: str) -> dict[str, Any]:
    """Return an image in COCO's format for annotations without sizes; the size is in the header of the file.

    Args:
        position: id of the image.
        folder: folder that `name` is relative to.
        name: name of the file.

    Raises:
        ValueError: if the file cannot be read.
    """
    try:
        height, width = read_size(folder / name)
    except BrokenImage as error:
        raise ValueError(f"the size of {folder / name} cannot be read: {error}") from error
    return {"id": position, "file_name": name, "height": height, "width": width}


def check_files(index: CocoIndex, folder: Path) -> None:
    """Check that each image of the data set has a file; each folder is listed once and no file is opened.

    Raises:
        ValueError: if a file is missing.
    """
    names = [file.decode() for file in index.files]
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        parent, file = os.path.split(name)
        if parent not in listed:
            directory = folder / parent
            listed[parent] = set(os.listdir(directory)) if directory.is_dir() else set()
        if file not in listed[parent]:
            missing.append(name)
    if missing:
        counts = f"{len(missing)} of {len(names)} images of {index.source} are missing"
        raise ValueError(f"{counts}, like {folder / missing[0]}")


def check_same_categories(index: CocoIndex, other: CocoIndex) -> None:
    """Check that two files of annotations have the same categories.

    Raises:
        ValueError: if they have not.
    """
    if index.categories != other.categories:
        id, name = min(set(index.categories.items()) ^ set(other.categories.items()))
        with_category, without = (index, other) if (id, name) in index.categories.items() else (other, index)
        raise ValueError(f"category {id}, {name!r}, of {with_category.source} is not in {without.source}")
