"""Images with any number of classes each, listed in CSV files."""

import csv
import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.base import SPLITS, ClassificationData
from datamodules.holdout import part_of_split
from datamodules.images import FileImages
from datamodules.scenes import find_scenes
from datamodules.split_checks import check_labels
from retinue.utils.suggestions import nearest

logger = logging.getLogger(__name__)

# Cells of a column of a class that mean that the class is, or is not, in the image; -1 is CelebA's 0.
PRESENT, ABSENT = ("1", "1.0"), ("0", "0.0", "-1", "-1.0", "")
# Names of separators that a command line would need quotes for.
SEPARATORS = {"space": " ", "semicolon": ";", "comma": ","}


class MultiLabelData(ClassificationData):
    """Base class of images with labels (N, K): 1 for the classes in an image and 0 for the others."""

    samplers = ("repeat_factor",)

    def image_classes(self, images: FileImages) -> tuple[np.ndarray, np.ndarray]:
        image, label = images.labels.nonzero()
        return image, label

    def check(self, images: FileImages, split: str) -> None:
        check_labels(self.image_classes(images)[1], self.class_names, split)


class MultiLabelCSV(MultiLabelData):
    """Images whose classes a CSV file lists, in one of two forms.

    A file of two columns, or one whose column `label_column` is named, has the names of an image's classes in one cell,
    with `separator` between them. Otherwise each class has a column of 0 and 1 (CelebA's -1 and empty cells count as
    0). An image may have no class.

    Args:
        train: CSV file, relative to `root`, with a header.
        val: CSV file for validation. None takes every fifth image of `train`.
        test: CSV file for testing. None tests on the validation split.
        images: folder that the images' names are relative to; itself relative to `root`.
        suffix: what follows the names in the CSV file, such as .jpg.
        image_column: column of the images' names. None takes the first.
        label_column: column of the names of the classes. None takes the second of two columns.
        separator: text between the names of classes, or a key of `SEPARATORS`; a blank stands for any white space.
        classes: names of the classes in the order of the labels; others are left out. None takes all names in `train`,
            sorted, or all columns but the first.
        common: arguments of `ClassificationData`.

    Raises:
        ValueError: if `train` or `separator` is empty. Loading raises it if a file is not as described.
    """

    def __init__(
        self,
        *,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        images: str = ".",
        suffix: str = "",
        image_column: str | None = None,
        label_column: str | None = None,
        separator: str = "|",
        classes: Sequence[str] | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        if train is None:
            raise ValueError("data=multi_label needs a CSV file of labels: data.train=FILE, relative to data.root")
        if not separator:
            raise ValueError(f"data.separator must be text between names, such as | or {', '.join(SEPARATORS)}")
        if isinstance(classes, str) or (classes is not None and len(set(classes)) < max(1, len(classes))):
            raise ValueError(f"data.classes must be a list of different names, not {classes!r}")
        self.files = {"train": train, "val": val, "test": test}
        self.folder, self.suffix = images, suffix
        self.image_column, self.label_column = image_column, label_column
        self.separator = SEPARATORS.get(separator, separator)
        self.classes = classes

    @property
    def splits(self) -> Sequence[str]:
        return [split for split in SPLITS if self.files[split] is not None or split == "val"]

    @cached_property
    def class_names(self) -> Sequence[str]:
        path, rows = self._read("train")
        columns = list(rows[0])
        label_column = self._label_column(columns, path)
        if label_column is None:
            known = [name for name in columns if name != self._image_column(columns, path)]
        else:
            known = sorted({name for row in rows for name in self._split(row[label_column])})
        if not known:
            raise ValueError(f"{path}: no image has a class")
        if self.classes is None:
            return known
        if unknown := [name for name in self.classes if name not in known]:
            raise ValueError(
                f"data.classes: {unknown[0]!r} is no class of {path}.{nearest(unknown[0], known)} There are: "
                + ", ".join(known)
            )
        return list(self.classes)

    def load(self, split: str) -> FileImages:
        assert self.root is not None
        has_file = self.files[split] is not None
        path, rows = self._read(split if has_file else "train")
        if self.files["val"] is None and split != "test":
            rows = [rows[i] for i in np.flatnonzero(part_of_split(np.arange(len(rows)), split))]
        names = [row[self._image_column(list(row), path)] + self.suffix for row in rows]
        labels = self._labels(rows, path)
        folder = self.root / self.folder
        if missing := [name for name in names if not (folder / name).exists()]:
            raise ValueError(f"{len(missing)} of {len(names)} images of {path} are missing, like {folder / missing[0]}")
        return FileImages(folder, names, labels)  # pyright: ignore[reportArgumentType]

    def _labels(self, rows: Sequence[dict[str, str]], path: Path) -> np.ndarray:
        """Return the labels of the images, int64 (N, K)."""
        column = self._label_column(list(rows[0]), path) if rows else None
        labels = np.zeros((len(rows), self.num_classes), np.int64)
        places = {name: k for k, name in enumerate(self.class_names)}
        for i, row in enumerate(rows):
            if column is not None:
                names = self._split(row[column])
                if self.classes is None and (unknown := [name for name in names if name not in places]):
                    raise ValueError(f"{path}, row {i + 1}: the class {unknown[0]!r} is not in {self.files['train']}")
                labels[i, [places[name] for name in names if name in places]] = 1
                continue
            for name, k in places.items():
                cell = row.get(name)
                if cell is None or cell.strip() not in (*PRESENT, *ABSENT):
                    found = "there is no such column" if cell is None else f"not {cell!r}"
                    raise ValueError(
                        f"{path}, row {i + 1}, column {name!r}: expected 0 or 1, {found}; data.label_column=NAME is "
                        "for a column with the names of classes, data.classes=[...] for some of the columns"
                    )
                labels[i, k] = cell.strip() in PRESENT
        return labels

    def _split(self, cell: str) -> list[str]:
        """Return the names of classes in a cell."""
        names = cell.split(None if self.separator.isspace() else self.separator)
        return [name.strip() for name in names if name.strip()]

    def _image_column(self, columns: list[str], path: Path) -> str:
        return columns[0] if self.image_column is None else _known(self.image_column, columns, "image_column", path)

    def _label_column(self, columns: list[str], path: Path) -> str | None:
        """Return the column with the names of classes; None if each class has a column."""
        if self.label_column is not None:
            return _known(self.label_column, columns, "label_column", path)
        return columns[1] if len(columns) == 2 else None

    def _read(self, split: str) -> tuple[Path, list[dict[str, str]]]:
        """Return the path of a split's file and its rows, by the columns' names."""
        assert self.root is not None
        path = self.root / str(self.files[split])
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, restkey="", skipinitialspace=True)
                rows = list(reader)
        except OSError as error:
            raise ValueError(f"data.{split}={self.files[split]}: {path} cannot be read: {error.strerror}") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is not a CSV file: {error}") from error
        if not rows or len(rows[0]) < 2:
            raise ValueError(f"{path}: expected a header and rows with the name of an image and its classes")
        for i, row in enumerate(rows):
            if "" in row or None in row.values():
                raise ValueError(
                    f"{path}, row {i + 1}: expected {len(reader.fieldnames or ())} cells, as in the header"
                )
        return path, rows


class ScenesLabels(MultiLabelData):
    """Which of the ten digits occur in each of the scenes (`datamodules.scenes`); without a root, in the user's cache.

    Digits that can hardly be seen are not counted.
    """

    class_names = tuple("0123456789")

    def find_root(self, root: str | None) -> Path | None:
        return super().find_root(str(find_scenes()) if root is None else root)

    def load(self, split: str) -> FileImages:
        assert self.root is not None
        content = json.loads((self.root / f"annotations/instances_{split}.json").read_text(encoding="utf-8"))
        places = {image["id"]: i for i, image in enumerate(content["images"])}
        labels = np.zeros((len(places), self.num_classes), np.int64)
        for digit in content["annotations"]:
            if not digit["iscrowd"]:
                labels[places[digit["image_id"]], digit["category_id"] - 1] = 1
        names = [image["file_name"] for image in content["images"]]
        return FileImages(self.root / f"images/{split}", names, labels)  # pyright: ignore[reportArgumentType]


def _known(name: str, columns: list[str], key: str, path: Path) -> str:
    if name not in columns:
        raise ValueError(f"data.{key}={name}: {path} has no such column.{nearest(name, columns)}")
    return name
