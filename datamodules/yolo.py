"""Data sets in the layout of YOLO's repositories: a YAML file, images, and one text file of objects per image.

The format is Ultralytics' (docs.ultralytics.com/datasets/detect and /segment), after Darknet's (Redmon et al.,
arXiv:1506.02640).
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from datamodules.base import SPLITS
from datamodules.coco_format import CocoIndex, index_coco
from datamodules.detection import DetectionData, check_classes, image_entry
from datamodules.images import EXTENSIONS, list_images

# Rounding may move a coordinate beyond the image, whose sides are 0 and 1.
TOLERANCE = 0.01


class YOLO(DetectionData):
    """Images, text files of objects, and a YAML file with `train`, `val`, `test` (may be missing) and `names`.

    A split is a folder of images, a text file that lists images, or a list of folders or text files. The objects of
    DIR/images/NAME.jpg are in DIR/labels/NAME.txt, one per line: `class x y width height` (center and size) or
    `class x1 y1 x2 y2 x3 y3 ...` (polygon), in shares of the image's width and height. An image without a text file has
    no objects. A line that occurs twice counts once.

    Args:
        config: YAML file, relative to `root`. Its paths are relative to its key `path`, which is relative to the file;
            a `path` that does not exist is taken for the folder of the file.
        classes: names of the classes to train on and to evaluate; objects of others are left out. None takes all.
        common: arguments of `DetectionData`.

    Raises:
        ValueError: if `classes` is a single name instead of a list. Loading raises it if a file is not as described.
    """

    def __init__(self, *, config: str = "data.yaml", classes: Sequence[str] | None = None, **common: Any):
        super().__init__(**common)
        assert self.root is not None
        self.config = self.root / config
        self.classes = check_classes(classes)

    @property
    def splits(self) -> Sequence[str]:
        return SPLITS if self._content.get("test") else SPLITS[:2]

    @cached_property
    def _content(self) -> dict[str, Any]:
        return read_config(self.config)

    def read(self, split: str) -> tuple[CocoIndex, Path]:
        names, keypoints = _class_names(self._content, self.config), "kpt_shape" in self._content
        folder = _base(self._content, self.config)
        files = list_split(self._content, self.config, split)
        source = f"{self.config} ({split})"
        images, annotations = [], []
        for position, file in enumerate(files):
            images.append(image_entry(position, folder, os.path.relpath(file, folder)))
            height, width = images[-1]["height"], images[-1]["width"]
            for label, shape in read_labels(label_path(file), names, keypoints):
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": position,
                        "category_id": label,
                        **_in_pixels(shape, height, width),
                    }
                )
        if not annotations:
            raise ValueError(f"{source}: none of {len(files)} images has objects; looked for {label_path(files[0])}")
        categories = [{"id": id, "name": name} for id, name in names.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        return index_coco(content, source, self.classes), folder


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file that describes a data set.

    Raises:
        ValueError: if there is no such file, or it is not as expected.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"data.config: {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not (isinstance(content, dict) and "names" in content):
        raise ValueError(f"{path} has no `names`: expected train, val and names, as YOLO's repositories have them")
    return content


def list_split(content: dict[str, Any], config: Path, split: str) -> list[Path]:
    """Return the image files of a split, sorted within each folder.

    Args:
        content: content of the YAML file.
        config: the YAML file.
        split: train, val or test.

    Raises:
        ValueError: if the split has no images, or one of its paths does not exist.
    """
    if not content.get(split):
        raise ValueError(f"{config} has no {split!r}: expected a folder or a list of images")
    entries = content[split] if isinstance(content[split], list) else [content[split]]
    files: list[Path] = []
    for entry in map(str, entries):
        path = _base(content, config) / entry
        if not path.exists() and entry.startswith("../"):
            # Roboflow's files write ../train/images for the folder train/images beside the file.
            path = _base(content, config) / entry[3:]
        if path.is_dir():
            files += [path / name for name in list_images(path)]
        elif path.is_file():
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            files += [Path(os.path.normpath(path.parent / line.strip())) for line in lines if line.strip()]
        else:
            raise ValueError(f"{config}: {split} is {entry!r}, but there is no {path}")
    if not files:
        raise ValueError(f"{config}: {split} has no images in {path} (looked for {', '.join(EXTENSIONS)})")
    return files


def label_path(image: Path) -> Path:
    """Return the file of an image's objects: the last folder called images is replaced by labels."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[:-1][::-1].index("images")
        parts[last] = "labels"
    return Path(*parts).with_suffix(".txt")


def read_labels(path: Path, names: dict[int, str], keypoints: bool = False) -> list[tuple[int, np.ndarray]]:
    """Return the class and the shape of each object of an image.

    Args:
        path: the text file. If there is none, the image has no objects.
        names: name of each class.
        keypoints: whether keypoints follow the box; they are left out.

    Returns:
        (class, shape) of each object; the shape is (4,), a box (x, y, width, height), or (N, 2), a polygon; in shares.

    Raises:
        ValueError: if a line is not as described in `YOLO`.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    objects: dict[str, tuple[int, np.ndarray]] = {}
    for number, line in enumerate(lines, 1):
        if line in objects or not (words := line.split()):
            continue
        try:
            values = np.array([float(word) for word in words])
        except ValueError:
            values = np.zeros(0)
        shape = values[1:5] if keypoints else values[1:]
        if len(shape) < 4 or len(shape) % 2 or not np.isfinite(values).all():
            raise ValueError(
                f"{path}:{number} is {line[:60]!r}: expected `class x y width height` or `class x1 y1 x2 y2 x3 y3 ...`"
            )
        if values[0] not in names:
            raise ValueError(f"{path}:{number} has the class {words[0]}: the data have {len(names)}, {_span(names)}")
        if shape.min() < -TOLERANCE or shape.max() > 1 + TOLERANCE:
            worst = shape[np.abs(shape - 0.5).argmax()]
            raise ValueError(f"{path}:{number} has the coordinate {worst:g}: expected shares of the image, 0 to 1")
        objects[line] = int(values[0]), shape if len(shape) == 4 else shape.reshape(-1, 2)
    return list(objects.values())


def _in_pixels(shape: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """Return an object's `bbox` and, for a polygon, its `area` and `segmentation`, as COCO has them."""
    if shape.ndim == 1:
        center, size = shape[:2] * (width, height), shape[2:] * (width, height)
        return {"bbox": [*(center - size / 2).tolist(), *size.tolist()]}
    points = shape * (width, height)
    low, high = points.min(0), points.max(0)
    x, y = (points - low).T
    # The shoelace formula.
    area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
    return {
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "area": float(area),
        "segmentation": [points.ravel().tolist()],
    }


def _base(content: dict[str, Any], config: Path) -> Path:
    """Return the folder that the paths of the YAML file are relative to."""
    folder = config.parent / Path(str(content.get("path") or ".")).expanduser()
    return folder if folder.is_dir() else config.parent


def _class_names(content: dict[str, Any], config: Path) -> dict[int, str]:
    names = content["names"]
    names = names if isinstance(names, dict) else dict(enumerate(names)) if isinstance(names, list) else {}
    if not names or not all(isinstance(id, int) for id in names):
        raise ValueError(f"{config}: `names` must be a list of names or a mapping of numbers to names")
    return {id: str(name) for id, name in sorted(names.items())}


def _span(names: dict[int, str]) -> str:
    return f"{min(names)} to {max(names)}"
