"""Any folder with one subfolder of images per class."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from datamodules.bands import EXTENSIONS as BAND_EXTENSIONS
from datamodules.bands import BandImages
from datamodules.base import SPLITS, ClassificationData
from datamodules.holdout import part_of_split
from datamodules.images import EXTENSIONS, FileImages, index_in_class, list_classes, read_class_folders
from datamodules.transforms import PILLOW_MODES


class ImageFolder(ClassificationData):
    """Images in `root`/{train,val[,test]}/<class>/* or in `root`/<class>/*.

    The name of a class is the name of its folder. Without a test folder, the test split is the validation split. If
    `root` has only class folders, every fifth image of a class is for validation.

    Args:
        bands: read .npy and TIFF files of `in_chans` bands in the files' units, as `datamodules.bands` does. None means
            if `in_chans` is neither 1 nor 3.
        in_chans: number of channels or bands.
        common: arguments of `ClassificationData`.
    """

    def __init__(self, *, bands: bool | None = None, in_chans: int = 3, **common: Any):
        self.has_bands = in_chans not in PILLOW_MODES if bands is None else bands
        super().__init__(in_chans=in_chans, **common)

    @cached_property
    def class_names(self) -> Sequence[str]:
        assert self.root is not None
        if not self._split_folders:
            return list_classes(self.root)
        if missing := {"train", "val"} - set(self._split_folders):
            raise ValueError(f"{self.root} has no {min(missing)} folder: expected train and val, or only class folders")
        classes = {split: list_classes(self.root / split) for split in self._split_folders}
        return check_same_classes(classes.pop("train"), classes)

    @property
    def splits(self) -> Sequence[str]:
        return self._split_folders if self._split_folders else ("train", "val")

    def load(self, split: str) -> FileImages:
        assert self.root is not None
        classes = self.class_names
        extensions = BAND_EXTENSIONS if self.has_bands else EXTENSIONS
        images = read_class_folders(self.root, split if self._split_folders else "", classes, extensions=extensions)
        if not self._split_folders:
            in_split = np.flatnonzero(part_of_split(index_in_class(images.labels), split))
            images = FileImages(self.root, [images.name(i) for i in in_split], images.labels[in_split].tolist())
        return BandImages(images, self.in_chans) if self.has_bands else images

    @cached_property
    def _split_folders(self) -> Sequence[str]:
        """Names of the folders in `root` that are splits."""
        assert self.root is not None
        return [split for split in SPLITS if (self.root / split).is_dir()]


def check_same_classes(train: list[str], others: dict[str, list[str]]) -> list[str]:
    """Return `train` after checking that every other split has the same class folders.

    Args:
        train: names of the class folders in train.
        others: names of the class folders in each other split.

    Raises:
        ValueError: if a class folder is in one split only.
    """
    for split, classes in others.items():
        for with_class, without, names in (
            ("train", split, sorted(set(train) - set(classes))),
            (split, "train", sorted(set(classes) - set(train))),
        ):
            if names:
                counts = f"{len(train)} class folders in train but {len(classes)} in {split}"
                examples = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                raise ValueError(f"{counts}: {examples} in {with_class}, not in {without}")
    return train
