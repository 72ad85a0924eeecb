"""ImageNet and data sets with its layout and class names: its subsets, ImageNet-A and ImageNet-R."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo

from datamodules.base import ClassificationData
from datamodules.classes import Classes
from datamodules.image_folder import check_same_classes
from datamodules.images import FileImages, list_classes, list_images, read_class_folders
from retinue.utils.suggestions import nearest

# Name of a class in WordNet, such as n01440764.
WNID = re.compile(r"n\d{8}")
# Usual names of the label file of a flat val folder.
LABEL_FILES = ("val.txt", "val_labels.txt", "val_labels.csv", "LOC_val_solution.csv")


@cache
def synsets(name: str = "imagenet") -> list[str]:
    """Return the wnids of a label set of timm, in the order of the labels.

    Args:
        name: imagenet (1,000 classes), imagenet_a, imagenet_r, ...

    Raises:
        ValueError: if timm has no label set of this name.
    """
    folder = files("timm.data") / "_info"
    names = [file.name.removesuffix("_synsets.txt") for file in folder.iterdir() if file.name.endswith("_synsets.txt")]
    if name not in names:
        known = ", ".join(sorted(names))
        raise ValueError(f"no list or file of classes is called {name!r}.{nearest(name, names)} There are: {known}")
    return (folder / f"{name}_synsets.txt").read_text().split()


def readable_names(wnids: Sequence[str]) -> list[str]:
    """Return a unique readable name for each wnid, such as "tench".

    A wnid without a name stands for itself. A name that two classes share is followed by the wnid.
    """
    describe = ImageNetInfo().label_name_to_description
    names = []
    for wnid in wnids:
        try:
            names.append(describe(wnid).split(",")[0])
        except KeyError:
            names.append(wnid)
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True)]


def read_labels(path: Path, classes: Sequence[str]) -> dict[str, str]:
    """Read a label file.

    A line is `ILSVRC2012_val_00000001.JPEG 65` (the number is a position in `classes`), `ILSVRC2012_val_00000001.JPEG
    n01751748` or, in Kaggle's file, `ILSVRC2012_val_00000001,n01751748 111 108 461 373`.

    Args:
        path: the label file.
        classes: sorted wnids.

    Returns:
        The wnid of each image, by the name of its file without suffix.

    Raises:
        ValueError: if a line has another form, or a class that is not in `classes`.
    """
    labels = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        words = re.split(r"[\s,]+", line.strip())
        if words == [""] or words[0] == "ImageId":
            continue
        if len(words) < 2:
            raise ValueError(f"{path}, line {number}: expected a file name and a wnid or class number, not {line!r}")
        name, wnid = words[:2]
        if wnid.isdecimal() and int(wnid) < len(classes):
            wnid = classes[int(wnid)]
        if wnid not in classes:
            raise ValueError(f"{path}, line {number}: {wnid!r} is not one of the {len(classes)} classes")
        labels[Path(name).stem] = wnid
    return labels


class ImageNet(ClassificationData):
    """Images in `root`/train/<wnid>/*, and `root`/val in wnid folders or flat with a label file.

    A root that has neither train nor val but wnid folders (ImageNet-A, ImageNet-R) is for evaluation only. The test
    split is the validation split, because ImageNet's test labels are not public.

    Args:
        synsets: folder: each class folder is a class, and its label is its position among the sorted names. imagenet1k:
            the labels are those of the 1,000 classes, and the folders may be some of them, which serves to evaluate
            weights for 1,000 classes.
        classes: classes to use: the name of a label set of timm (imagenet_a, imagenet_r, mini_imagenet), a list of
            wnids, or a text file with one wnid per line. None uses all classes. With synsets=imagenet1k, evaluation
            compares only the logits of these classes.
        val_labels: label file of a flat val (see `read_labels`). None looks for a file in `root` with one of the names
            in `LABEL_FILES`.
        common: arguments of `ClassificationData`.

    Raises:
        ValueError: if an argument is invalid.
    """

    def __init__(
        self,
        *,
        synsets: str = "folder",
        classes: str | Sequence[str] | None = None,
        val_labels: str | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        if synsets not in ("folder", "imagenet1k"):
            raise ValueError(f"data.synsets must be folder or imagenet1k, not {synsets!r}")
        self.synsets = synsets
        self.classes = None if classes is None else _class_list(classes)
        self.val_labels = val_labels

    @cached_property
    def wnids(self) -> list[str]:
        """Wnids of the classes, by label."""
        return synsets() if self.synsets == "imagenet1k" else self._used_wnids

    @cached_property
    def class_names(self) -> Sequence[str]:
        return readable_names(self.wnids)

    @property
    def class_subset(self) -> list[int] | None:
        """Labels of the only logits that evaluation compares; None compares all logits."""
        if self.synsets == "folder" or self.classes is None:
            return None
        return [self.wnids.index(wnid) for wnid in self._used_wnids]

    @staticmethod
    def published_classes() -> Classes:
        """Return the 1,000 classes of ImageNet-1k."""
        names = readable_names(synsets())
        return Classes(names, range(len(names)))

    @property
    def splits(self) -> Sequence[str]:
        return ("train", "val") if (self._root / "train").is_dir() else ("val",)

    def load(self, split: str) -> FileImages:
        root = self._root
        if split not in self.splits:
            raise ValueError(f"{root} has no {split} folder, so it is for evaluation only")
        folder = split if (root / split).is_dir() else ""
        if folder == "val" and not _wnid_folders(root / "val"):
            return self._load_flat_val()
        wnids = [wnid for wnid in self._used_wnids if (root / folder / wnid).is_dir()]
        return read_class_folders(root, folder, wnids, [self.wnids.index(wnid) for wnid in wnids])

    @property
    def _root(self) -> Path:
        assert self.root is not None
        return self.root

    @cached_property
    def _class_folders(self) -> list[str]:
        """Names of the class folders, which must be the same in every split that has class folders."""
        root = self._root
        split_folders = [split for split in ("train", "val") if (root / split).is_dir()]
        if not split_folders:
            # The class folders are in the root itself.
            split_folders = [""]
        classes = {split: names for split in split_folders if (names := _wnid_folders(root / split))}
        if not classes:
            # A folder without any class folder is another error, which list_classes raises.
            list_classes(root / split_folders[0])
            raise ValueError(f"no class folders named by wnids, like n01440764, in {root / split_folders[0]}")
        first = classes.pop(next(iter(classes)))
        return check_same_classes(first, classes) if self.synsets == "folder" else first

    @cached_property
    def _used_wnids(self) -> list[str]:
        """Sorted wnids of the classes whose images are used."""
        known = synsets() if self.synsets == "imagenet1k" else self._class_folders
        if self.synsets == "imagenet1k" and (unknown := set(self._class_folders) - set(known)):
            raise ValueError(f"{min(unknown)} in {self._root} is no class of ImageNet-1k: use data.synsets=folder")
        if self.classes is None:
            return known
        if unknown := set(self.classes) - set(known):
            raise ValueError(f"{min(unknown)!r} in data.classes is not one of the {len(known)} classes of {self._root}")
        return sorted(self.classes)

    def _load_flat_val(self) -> FileImages:
        """Read a val folder without class folders."""
        root = self._root
        if self.val_labels is None:
            label_files = [root / name for name in LABEL_FILES if (root / name).is_file()]
            if not label_files:
                raise ValueError(
                    f"{root / 'val'} has no class folders and there is no label file: "
                    f"expected {', '.join(LABEL_FILES)} in {root}, or data.val_labels=FILE"
                )
            path = label_files[0]
        else:
            path = Path(self.val_labels).expanduser()
            if not path.is_file():
                raise ValueError(f"data.val_labels={self.val_labels} is missing")
        wnids = read_labels(path, synsets() if self.synsets == "imagenet1k" else self._class_folders)
        images = {Path(name).stem: name for name in list_images(root / "val")}
        for problem, names in (
            ("labels for images that are not in val", wnids.keys() - images.keys()),
            ("no label for images that are in val", images.keys() - wnids.keys()),
        ):
            if names:
                raise ValueError(f"{path} has {problem}: {len(names)}, like {min(names)}; val has {len(images)} images")
        labels = {wnid: self.wnids.index(wnid) for wnid in self._used_wnids}
        used = [(name, labels[wnids[stem]]) for stem, name in sorted(images.items()) if wnids[stem] in labels]
        return FileImages(root / "val", [name for name, _ in used], [label for _, label in used])


def _wnid_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and WNID.fullmatch(entry.name))


def _class_list(classes: str | Sequence[str]) -> list[str]:
    """Return the wnids that a list, a text file or the name of a label set of timm stands for."""
    if not isinstance(classes, str):
        return list(classes)
    path = Path(classes).expanduser()
    if not path.is_file():
        return synsets(classes)
    return [line.split()[0] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
