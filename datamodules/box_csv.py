"""Boxes in CSV files, as for keras-retinanet, DeepForest and TensorFlow's object detection."""

import csv
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.base import SPLITS
from datamodules.coco_format import CocoIndex, index_coco
from datamodules.detection import DetectionData, check_classes, choose_names, image_entry

# Names that a column may have in a header, in any case.
COLUMNS = {
    "image": ("image", "image_path", "image_name", "img", "filename", "file_name", "file", "path"),
    "x1": ("x1", "xmin", "x_min"),
    "y1": ("y1", "ymin", "y_min"),
    "x2": ("x2", "xmax", "x_max"),
    "y2": ("y2", "ymax", "y_max"),
    "class": ("class", "class_name", "label", "category"),
}
SIDES = ("x1", "y1", "x2", "y2")
# Objects of an image: (class, [x1, y1, x2, y2]).
Objects = list[tuple[str, list[float]]]


class BoxCSV(DetectionData):
    """CSV files with one box per line: image, x1, y1, x2, y2 in pixels, and class.

    x2 and y2 are the right and the lower end of the box, so that x2 - x1 is its width. A line with an image and
    without a box, or with the box 0, 0, 0, 0 (as DeepForest writes it), is an image without objects.

    Args:
        train: CSV file, relative to `root`.
        val: CSV file for validation.
        test: CSV file for testing. None tests on the validation split.
        images: folder that the images' names are relative to; itself relative to `root`.
        columns: names of all columns in their order, with image, x1, y1, x2, y2 and class among them. None takes the
            header of the file, or the order image, x1, y1, x2, y2, class for a file without a header.
        classes: names of the classes in the order of the labels; boxes of other classes are left out. None takes the
            names in the training file, sorted.
        common: arguments of `DetectionData`.

    Raises:
        ValueError: if `columns` or `classes` is not as described. Loading raises it if a file is not as described.
    """

    def __init__(
        self,
        *,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        images: str = ".",
        columns: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        self.tables = {"train": train, "val": val, "test": test}
        self.image_folder = images
        if columns is not None and not (isinstance(columns, list | tuple) and set(COLUMNS) <= set(columns)):
            raise ValueError(f"data.columns must be a list with {', '.join(COLUMNS)} among its names, not {columns!r}")
        self.columns = columns
        self.classes = check_classes(classes)

    @property
    def splits(self) -> Sequence[str]:
        return SPLITS if self.tables["test"] else SPLITS[:2]

    @cached_property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, by label."""
        found = (name for objects in self._read_table("train").values() for name, _ in objects)
        return choose_names(self.classes, found)

    def read(self, split: str) -> tuple[CocoIndex, Path]:
        assert self.root is not None
        source = str(self._path(split))
        folder = self.root / Path(self.image_folder).expanduser()
        labels = {name: label for label, name in enumerate(self.class_names)}
        images, annotations = [], []
        for position, (image, objects) in enumerate(self._read_table(split).items()):
            images.append(image_entry(position, folder, image))
            for name, (x1, y1, x2, y2) in objects:
                if name not in labels and self.classes:
                    continue
                if name not in labels:
                    raise ValueError(f"{source} has a {name!r}, which is none of the classes: {', '.join(labels)}")
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": position,
                        "category_id": labels[name],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                    }
                )
        categories = [{"id": label, "name": name} for name, label in labels.items()]
        return index_coco({"images": images, "annotations": annotations, "categories": categories}, source), folder

    def _path(self, split: str) -> Path:
        assert self.root is not None
        name = self.tables[split]
        if name is None:
            raise ValueError(f"data.{split} is needed: a CSV file of boxes")
        return self.root / Path(name).expanduser()

    def _read_table(self, split: str) -> dict[str, Objects]:
        path = self._path(split)
        if not path.is_file():
            raise ValueError(f"data.{split}: there is no file {path}")
        return read_boxes(path, self.columns)


def read_boxes(path: Path, columns: Sequence[str] | None = None) -> dict[str, Objects]:
    """Return the objects of each image in a CSV file.

    Args:
        path: the file.
        columns: names of its columns. None: see `BoxCSV`.

    Raises:
        ValueError: if the file is empty or no CSV file, or lacks a column, or a line has no valid box.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            rows = [(reader.line_num, row) for row in reader if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file: {error}") from error
    if not rows:
        raise ValueError(f"{path} is empty")
    positions, has_header = _find_columns(path, rows[0][1], columns)
    images: dict[str, Objects] = {}
    for line, row in rows[has_header:]:
        if len(row) <= max(positions.values()):
            raise ValueError(f"{path}:{line} has {len(row)} values: expected at least {max(positions.values()) + 1}")
        values = {name: row[position].strip() for name, position in positions.items()}
        objects = images.setdefault(values["image"], [])
        box = _numbers([values[side] for side in SIDES])
        if box is None:
            if any(values[side] for side in SIDES):
                given = ", ".join(values[side] for side in SIDES)
                raise ValueError(f"{path}:{line} has the box {given}: expected x1, y1, x2, y2 in pixels")
        elif any(box):
            x1, y1, x2, y2 = box
            if x1 >= x2 or y1 >= y2:
                raise ValueError(f"{path}:{line} has the box {box}: expected x1 < x2 and y1 < y2")
            if not values["class"]:
                raise ValueError(f"{path}:{line} has a box without a class")
            objects.append((values["class"], box))
    return images


def _find_columns(path: Path, first: list[str], columns: Sequence[str] | None) -> tuple[dict[str, int], bool]:
    """Return the position of each column, and whether the file's first row is a header."""
    if columns is not None:
        positions = {name: list(columns).index(name) for name in COLUMNS}
        sides = [first[positions[side]].strip() for side in SIDES if positions[side] < len(first)]
        return positions, any(sides) and _numbers(sides) is None
    header = [name.strip().lower() for name in first]
    positions = {
        column: next((header.index(name) for name in names if name in header), None)
        for column, names in COLUMNS.items()
    }
    missing = [column for column, position in positions.items() if position is None]
    if not missing:
        return {column: position for column, position in positions.items() if position is not None}, True
    sides = [value.strip() for value in first[1:5]]
    if len(first) >= len(COLUMNS) and (not any(sides) or _numbers(sides) is not None):
        return {column: position for position, column in enumerate(COLUMNS)}, False
    names = " or ".join(COLUMNS[missing[0]])
    raise ValueError(f"{path} has no column {names} in its header {','.join(first)}; data.columns=[...] names them")


def _numbers(values: Sequence[str]) -> list[float] | None:
    """Return finite numbers, or None if a value is none."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None
