"""Test sets for nets with ImageNet's 1,000 classes whose folders are not named by wnids: ImageNet-V2 and ObjectNet."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from timm.data import ImageNetInfo

from datamodules.imagenet import ImageNet, synsets
from datamodules.images import FileImages, read_class_folders


class ImageNetV2(ImageNet):
    """ImageNet-V2 (Recht et al., ICML 2019, arXiv:1902.10811): images in `root`/<label>/*, from 0 to 999.

    Wnids in place of the labels work too.
    """

    @property
    def splits(self) -> Sequence[str]:
        return ("val",)

    def load(self, split: str) -> FileImages:
        labels = sorted(int(path.name) for path in self._root.iterdir() if path.is_dir() and path.name.isdecimal())
        if not labels:
            return super().load(split)
        if labels[-1] >= len(self.wnids):
            raise ValueError(f"{self._root} has a folder {labels[-1]}: the folders of ImageNet-V2 are 0 to 999")
        return read_class_folders(self._root, "", [str(label) for label in labels], labels)


class ObjectNet(ImageNet):
    """ObjectNet (Barbu et al., NeurIPS 2019): the 113 of its 313 objects that are classes of ImageNet, without borders.

    `root` is the folder of its archive: images/<object>/*, and mappings/*.json, which name ImageNet's classes of an
    object. An object may be several classes of ImageNet; the label of an image is the first of them.
    """

    @property
    def splits(self) -> Sequence[str]:
        return ("val",)

    def load(self, split: str) -> "Borderless":
        folders = sorted(self.labels_by_folder)
        labels = [self.labels_by_folder[folder][0] for folder in folders]
        images = read_class_folders(self._root, "images", folders, labels)
        return Borderless(self._root / "images", [images.name(i) for i in range(len(images))], images.labels.tolist())

    @cached_property
    def labels_by_folder(self) -> dict[str, list[int]]:
        """Labels of the classes of ImageNet that are right for the images of each folder."""
        names = _read(self._root / "mappings" / "folder_to_objectnet_label.json")
        classes = _read(self._root / "mappings" / "objectnet_to_imagenet_1k.json")
        describe = ImageNetInfo().label_name_to_description
        label_of = {describe(wnid): label for label, wnid in enumerate(synsets())}
        labels = {}
        for folder, name in names.items():
            if name not in classes or not (self._root / "images" / folder).is_dir():
                continue
            descriptions = classes[name].split("; ")
            if unknown := [text for text in descriptions if text not in label_of]:
                raise ValueError(f"{self._root}/mappings: {unknown[0]!r} is no class of ImageNet-1k")
            labels[folder] = [label_of[text] for text in descriptions]
        return labels

    def accepted(self, index: int) -> list[int]:
        """Return the labels that are right for the test image at a position."""
        return self.labels_by_folder[Path(self.images("test").name(index)).parts[0]]


class Borderless(FileImages):
    """Images without their border of two pixels, which marks the images of ObjectNet."""

    def image(self, index: int) -> np.ndarray:
        return super().image(index)[2:-2, 2:-2]


def _read(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}, which ObjectNet has, cannot be read: {error}") from None
