"""ImageNet and what is laid out and named like it (its subsets, ImageNet-A, ImageNet-R)."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path

from timm.data import ImageNetInfo

from datamodules.base import ClassificationData
from datamodules.image_folder import same_classes
from datamodules.images import FileImages, class_folders, list_classes, list_images
from retinue.utils.suggestions import nearest

WNID = re.compile(r"n\d{8}")
LABEL_FILES = ("val.txt", "val_labels.txt", "val_labels.csv", "LOC_val_solution.csv")


@cache
def synsets(name: str = "imagenet") -> list[str]:
    """The wnids of a label set that timm knows, in label order: imagenet (1,000), imagenet_a, imagenet_r, ...

    Raises:
        ValueError: timm knows none of this name.
    """
    folder = files("timm.data") / "_info"
    names = [file.name.removesuffix("_synsets.txt") for file in folder.iterdir() if file.name.endswith("_synsets.txt")]
    if name not in names:
        known = ", ".join(sorted(names))
        raise ValueError(f"no list or file of classes is called {name!r}.{nearest(name, names)} There are: {known}")
    return (folder / f"{name}_synsets.txt").read_text().split()


def readable(wnids: Sequence[str]) -> list[str]:
    """Unique names for people, like "tench"; a wnid where there is none, and beside names that two classes share."""
    described = ImageNetInfo().label_name_to_description
    names = []
    for wnid in wnids:
        try:
            names.append(described(wnid).split(",")[0])
        except KeyError:
            names.append(wnid)
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True)]


def read_labels(path: Path, classes: Sequence[str]) -> dict[str, str]:
    """File name without suffix → wnid, from lines like `ILSVRC2012_val_00000001.JPEG 65` (position in the sorted
    wnids), `..., n01751748` or Kaggle's `ILSVRC2012_val_00000001,n01751748 111 108 461 373`.

    Raises:
        ValueError: a line is not like that, or names a class that is not in `classes`.
    """
    labels = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
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
    """`root`/train/<wnid>/*, and `root`/val either in wnid folders or flat beside a label file.

    A root with neither train nor val but wnid folders (ImageNet-A, ImageNet-R) is all for evaluation. The test split is
    the validation split: ImageNet's own test labels are not public.

    Args:
        synsets: folder: a class is a folder, its label the position in the sorted names; imagenet1k: the labels are
            those of the 1,000 classes, of which the folders may be some (to evaluate 1,000-class weights).
        classes: keep to these classes: a list of timm's by name (imagenet_a, imagenet_r, mini_imagenet), wnids, or a
            text file with one wnid a line. With synsets=imagenet1k only their logits are compared.
        val_labels: the label file of a flat val (see `read_labels`); None: one of the usual names in `root`.
    """

    def __init__(
        self,
        *,
        synsets: str = "folder",
        classes: str | Sequence[str] | None = None,
        val_labels: str | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if synsets not in ("folder", "imagenet1k"):
            raise ValueError(f"data.synsets must be folder or imagenet1k, not {synsets!r}")
        self.synsets = synsets
        self.classes = None if classes is None else _class_list(classes)
        self.val_labels = val_labels

    @cached_property
    def wnids(self) -> list[str]:
        """Of the labels, in order."""
        return synsets() if self.synsets == "imagenet1k" else self._kept

    @cached_property
    def class_names(self) -> Sequence[str]:
        return readable(self.wnids)

    @property
    def class_subset(self) -> list[int] | None:
        if self.synsets == "folder" or self.classes is None:
            return None
        return [self.wnids.index(wnid) for wnid in self._kept]

    @property
    def splits(self) -> Sequence[str]:
        return ("train", "val") if (self._root / "train").is_dir() else ("val",)

    def load(self, split: str) -> FileImages:
        root = self._root
        if split not in self.splits:
            raise ValueError(f"{root} has no {split} folder, so it is for evaluation only")
        folder = split if (root / split).is_dir() else ""
        if folder == "val" and not _wnid_folders(root / "val"):
            return self._flat()
        kept = [wnid for wnid in self._kept if (root / folder / wnid).is_dir()]
        return class_folders(root, folder, kept, [self.wnids.index(wnid) for wnid in kept])

    @property
    def _root(self) -> Path:
        assert self.root is not None
        return self.root

    @cached_property
    def _folders(self) -> list[str]:
        """The class folders, which every split in folders must have."""
        root = self._root
        within = [split for split in ("train", "val") if (root / split).is_dir()] or [""]
        found = {split: names for split in within if (names := _wnid_folders(root / split))}
        if not found:
            list_classes(root / within[0])  # no folders at all is another error
            raise ValueError(f"no class folders named by wnids, like n01440764, in {root / within[0]}")
        classes = found.pop(next(iter(found)))
        return same_classes(classes, found) if self.synsets == "folder" else classes

    @cached_property
    def _kept(self) -> list[str]:
        """The classes whose images count, sorted."""
        known = synsets() if self.synsets == "imagenet1k" else self._folders
        if self.synsets == "imagenet1k" and (unknown := set(self._folders) - set(known)):
            raise ValueError(f"{min(unknown)} in {self._root} is no class of ImageNet-1k: take data.synsets=folder")
        if self.classes is None:
            return known
        if unknown := set(self.classes) - set(known):
            raise ValueError(f"{min(unknown)!r} in data.classes is not one of the {len(known)} classes of {self._root}")
        return sorted(self.classes)

    def _flat(self) -> FileImages:
        """val without class folders."""
        root = self._root
        usual = [root / name for name in LABEL_FILES if (root / name).is_file()]
        if self.val_labels is None and not usual:
            raise ValueError(
                f"{root / 'val'} has no class folders and there is no label file: expected {', '.join(LABEL_FILES)} "
                f"in {root}, or data.val_labels=FILE"
            )
        path = usual[0] if self.val_labels is None else Path(self.val_labels).expanduser()
        if not path.is_file():
            raise ValueError(f"data.val_labels={self.val_labels} is missing")
        labels = read_labels(path, synsets() if self.synsets == "imagenet1k" else self._folders)
        images = {Path(name).stem: name for name in list_images(root / "val")}
        for what, names in (
            ("labels for images that are not in val", labels.keys() - images.keys()),
            ("no label for images that are in val", images.keys() - labels.keys()),
        ):
            if names:
                raise ValueError(f"{path} has {what}: {len(names)}, like {min(names)}; val has {len(images)} images")
        place = {wnid: self.wnids.index(wnid) for wnid in self._kept}
        chosen = [(name, place[labels[stem]]) for stem, name in sorted(images.items()) if labels[stem] in place]
        return FileImages(root / "val", [name for name, _ in chosen], [label for _, label in chosen])


def _wnid_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and WNID.fullmatch(entry.name))


def _class_list(classes: str | Sequence[str]) -> list[str]:
    if not isinstance(classes, str):
        return list(classes)
    path = Path(classes).expanduser()
    if not path.is_file():
        return synsets(classes)
    return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
