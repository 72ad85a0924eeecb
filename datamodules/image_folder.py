"""Any folder of images sorted into one folder a class."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from datamodules.base import SPLITS, ClassificationData
from datamodules.images import FileImages, class_folders, list_classes, rank_in_class


class ImageFolder(ClassificationData):
    """`root`/{train,val[,test]}/<class>/*, or `root`/<class>/* alone; a class's name is its folder's.

    Without a test folder the test split is the validation split. Where there are only class folders, every fifth image
    of a class is for validation.
    """

    @cached_property
    def class_names(self) -> Sequence[str]:
        assert self.root is not None
        if not self._folders:
            return list_classes(self.root)
        if missing := {"train", "val"} - set(self._folders):
            raise ValueError(f"{self.root} has no {min(missing)} folder: expected train and val, or only class folders")
        classes = {folder: list_classes(self.root / folder) for folder in self._folders}
        return same_classes(classes.pop("train"), classes)

    @property
    def splits(self) -> Sequence[str]:
        return self._folders or ("train", "val")

    def load(self, split: str) -> FileImages:
        assert self.root is not None
        classes = self.class_names
        if self._folders:
            return class_folders(self.root, split, classes)
        images = class_folders(self.root, "", classes)
        mine = np.flatnonzero((rank_in_class(images.labels) % 5 == 0) == (split == "val"))
        return FileImages(self.root, [images.name(i) for i in mine], images.labels[mine].tolist())

    @cached_property
    def _folders(self) -> Sequence[str]:
        """The folders that are splits."""
        assert self.root is not None
        return [split for split in SPLITS if (self.root / split).is_dir()]


def same_classes(train: list[str], others: dict[str, list[str]]) -> list[str]:
    """`train`, if every other split has the same class folders.

    Raises:
        ValueError: names some that are only in one.
    """
    for split, classes in others.items():
        for here, there, only in (
            ("train", split, sorted(set(train) - set(classes))),
            (split, "train", sorted(set(classes) - set(train))),
        ):
            if only:
                counts = f"{len(train)} class folders in train but {len(classes)} in {split}"
                names = ", ".join(only[:3]) + (", ..." if len(only) > 3 else "")
                raise ValueError(f"{counts}: {names} in {here}, not in {there}")
    return train
