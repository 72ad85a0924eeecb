"""COCO (arXiv:1405.0312), PIDray, and any other data set in COCO's format."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.base import SPLITS
from datamodules.coco_format import CocoIndex, read_coco
from datamodules.detection import DetectionData, check_classes, check_same_categories
from retinue.utils.suggestions import nearest


class Coco(DetectionData):
    """Images in folders, with one JSON file of annotations per split.

    Masks are used if every annotation has one; heads with masks ignore an object whose mask is empty. Without
    annotations for testing, the test split is the validation split.

    Args:
        train_annotations: JSON file, relative to `root`.
        train_images: folder that the `file_name`s in `train_annotations` are relative to; itself relative to `root`.
        val_annotations: as `train_annotations`, for validation.
        val_images: as `train_images`, for validation.
        test_annotations: as `train_annotations`, for testing. None means no test split.
        test_images: as `train_images`, for testing.
        classes: names of the categories to train on and to evaluate; annotations of others are left out. None takes all
            categories. The labels are in the order of the category ids.
        common: arguments of `DetectionData`.

    Raises:
        ValueError: if `classes` is a single name instead of a list.
    """

    def __init__(
        self,
        *,
        train_annotations: str | None = None,
        train_images: str | None = None,
        val_annotations: str | None = None,
        val_images: str | None = None,
        test_annotations: str | None = None,
        test_images: str | None = None,
        classes: Sequence[str] | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        self.classes = check_classes(classes)
        self.annotation_files = {"train": train_annotations, "val": val_annotations, "test": test_annotations}
        self.image_folders = {"train": train_images, "val": val_images, "test": test_images}

    @property
    def splits(self) -> Sequence[str]:
        return SPLITS if self.annotation_files["test"] else SPLITS[:2]

    def read(self, split: str) -> tuple[CocoIndex, Path]:
        return self._read(split, self.annotation_files[split], self.image_folders[split])

    def _read(self, split: str, annotation_file: str | None, image_folder: str | None) -> tuple[CocoIndex, Path]:
        annotations = self._path(f"{split}_annotations", annotation_file)
        folder = self._path(f"{split}_images", image_folder)
        if not annotations.is_file():
            raise ValueError(f"data.{split}_annotations: there is no file {annotations}")
        if not folder.is_dir():
            raise ValueError(f"data.{split}_images: there is no folder {folder}")
        return read_coco(annotations, self.classes), folder

    def _path(self, key: str, value: str | None) -> Path:
        assert self.root is not None
        if value is None:
            raise ValueError(f"data.{key} is needed")
        return self.root / Path(value).expanduser()


class PIDray(Coco):
    """Prohibited items in X-ray images (arXiv:2108.07020), in the layout of the authors' archive.

    The annotations are `root`/annotations/xray_{train,test_easy,test_hard,test_hidden}.json and the images are in
    `root`/{train,easy,hard,hidden}. There is no validation set: as in the authors' repository, validation uses the
    images of the test.

    Args:
        test: test set, or a list of test sets: easy (one prohibited item per image), hard (several items) or hidden
            (deliberately concealed items). The figures of several sets are the means over the sets, as in the paper,
            and the images of several sets are numbered anew, since each file of the archive has its own numbers.
        common: arguments of `DetectionData`.

    Raises:
        ValueError: if there is no such test set, or a set is named twice.
    """

    TEST_SETS = ("easy", "hard", "hidden")

    def __init__(self, *, test: str | Sequence[str] = "easy", **common: Any):
        sets = [test] if isinstance(test, str) else list(test)
        for name in sets:
            if name not in self.TEST_SETS:
                hint = nearest(str(name), self.TEST_SETS)
                raise ValueError(f"data.test must be easy, hard or hidden, or a list of these, not {name!r}.{hint}")
        if not sets or len(set(sets)) < len(sets):
            raise ValueError(f"data.test must name at least one test set, and each set once, not {sets}")
        super().__init__(train_annotations="annotations/xray_train.json", train_images="train", **common)
        self.test_sets = sets
        self._sets: dict[str, range] = {}

    def read(self, split: str) -> tuple[CocoIndex, Path]:
        if split == "train":
            return super().read(split)
        parts = {name: self._read(split, f"annotations/xray_test_{name}.json", name) for name in self.test_sets}
        if len(parts) == 1:
            return parts[self.test_sets[0]]
        assert self.root is not None
        indexes = {name: index for name, (index, _) in parts.items()}
        ends = np.cumsum([0, *(len(index.ids) for index in indexes.values())]).tolist()
        self._sets = {name: range(*bounds) for name, bounds in zip(indexes, pairwise(ends), strict=True)}
        return join(indexes), self.root

    def sets(self, split: str) -> dict[str, range]:
        # The positions are known once the images have been read.
        self.images(split)
        return {} if split == "train" else self._sets


def join(parts: Mapping[str, CocoIndex]) -> CocoIndex:
    """Join annotations of several sets to those of one set; images and annotations are numbered anew from 0 and 1.

    Args:
        parts: annotations of each set, by the name of the folder of its images; the joined file names begin with it.

    Raises:
        ValueError: if the sets have different categories.
    """
    indexes = list(parts.values())
    for index in indexes[1:]:
        check_same_categories(index, indexes[0])

    def concatenate(name: str) -> np.ndarray:
        return np.concatenate([getattr(index, name) for index in indexes])

    def shifted(name: str, lengths: Sequence[int]) -> np.ndarray:
        offsets = np.cumsum([0, *lengths[:-1]])
        return np.concatenate([getattr(index, name) + offset for index, offset in zip(indexes, offsets, strict=True)])

    has_masks = all(index.segmentations is not None for index in indexes)
    bytes_of_masks = [0 if index.segmentations is None else len(index.segmentations) for index in indexes]
    names = ("sizes", "labels", "boxes", "areas", "crowd", "unused", "maskless")
    return replace(
        indexes[0],
        source=", ".join(index.source for index in indexes),
        ids=np.arange(sum(len(index.ids) for index in indexes)),
        files=np.array([folder.encode() + b"/" + file for folder, index in parts.items() for file in index.files]),
        image_index=shifted("image_index", [len(index.ids) for index in indexes]),
        annotation_ids=np.arange(1, 1 + sum(len(index.boxes) for index in indexes)),
        segmentations=concatenate("segmentations") if has_masks else None,
        spans=shifted("spans", bytes_of_masks),
        **{name: concatenate(name) for name in names},
    )
