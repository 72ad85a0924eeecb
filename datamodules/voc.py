"""Pascal VOC (host.robots.ox.ac.uk/pascal/VOC), and any set with annotations in its XML."""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from datamodules.base import SPLITS
from datamodules.coco_format import CocoIndex, index_coco
from datamodules.detection import DetectionData
from datamodules.images import EXTENSIONS
from retinue.utils.suggestions import nearest

SETS, ANNOTATIONS, IMAGES = Path("ImageSets/Main"), "Annotations", "JPEGImages"


class VOC(DetectionData):
    """Folders of ImageSets/Main/<set>.txt (an image's name a line), Annotations/<name>.xml and JPEGImages/<name>.jpg.

    Difficult objects are crowds in COCO's sense: ignored in training, and in evaluation neither found nor missed. A box
    includes the pixels of its four sides, which VOC counts from 1: xmin..xmax is x from xmin - 1 to xmax.

    Args:
        train, val, test: the sets of a split, each SET, or FOLDER/SET below `root`: [VOC2007/trainval,
            VOC2012/trainval]. No test: val.
        classes: names in the order of the labels; None: those in the training annotations, sorted (VOC's own order).
        common: arguments of `DetectionData`.
    """

    def __init__(
        self,
        *,
        train: Sequence[str] = ("train",),
        val: Sequence[str] = ("val",),
        test: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        self.sets = {"train": train, "val": val, "test": test}
        for split, sets in self.sets.items():
            if isinstance(sets, str):
                raise ValueError(f"data.{split} must be a list of sets, like [{sets}], not {sets!r}")
        if isinstance(classes, str):
            raise ValueError(f"data.classes must be a list of names, like [{classes}], not {classes!r}")
        self.classes = classes

    @property
    def splits(self) -> Sequence[str]:
        return SPLITS if self.sets["test"] else SPLITS[:2]

    @cached_property
    def class_names(self) -> Sequence[str]:
        if self.classes:
            return list(self.classes)
        return sorted({name for entry in self._entries("train") for name, _, _ in entry["objects"]})

    def read(self, split: str) -> tuple[CocoIndex, Path]:
        assert self.root is not None
        source = f"{self.root} ({', '.join(self.sets[split] or ())})"
        labels = {name: label for label, name in enumerate(self.class_names)}
        images, annotations = [], []
        for position, entry in enumerate(self._entries(split)):
            images.append({"id": position, **{key: entry[key] for key in ("file_name", "height", "width")}})
            for name, difficult, (x1, y1, x2, y2) in entry["objects"]:
                if name not in labels:
                    known = ", ".join(self.class_names)
                    raise ValueError(f"{entry['xml']} has a {name!r}, which is none of the classes: {known}")
                box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
                row = {"id": len(annotations), "image_id": position, "category_id": labels[name]}
                annotations.append(row | {"bbox": box, "iscrowd": difficult})
        categories = [{"id": label, "name": name} for name, label in labels.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        return index_coco(content, source), self.root

    def _entries(self, split: str) -> list[dict[str, Any]]:
        """A split's images: `file_name`, `height`, `width`, `xml`, and `objects`, each (class, difficult, corners)."""
        assert self.root is not None
        entries = []
        for name in self.sets[split] or ():
            inside, set_name = os.path.split(name)
            folder = self.root / inside
            files = {Path(file).stem: file for file in _list(folder / IMAGES) if file.lower().endswith(EXTENSIONS)}
            for stem in _read_set(folder, set_name):
                if stem not in files:
                    raise ValueError(f"{stem} of {folder / SETS / set_name}.txt has no image in {folder / IMAGES}")
                entry = _read_xml(folder / ANNOTATIONS / f"{stem}.xml")
                entries.append(entry | {"file_name": os.path.join(inside, IMAGES, files[stem])})
        return entries


def _list(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: expected {ANNOTATIONS}, {SETS} and {IMAGES} in {folder.parent}")
    return os.listdir(folder)


def _read_set(folder: Path, name: str) -> list[str]:
    path = folder / SETS / f"{name}.txt"
    if not path.is_file():
        names = sorted(file.removesuffix(".txt") for file in _list(folder / SETS) if file.endswith(".txt"))
        raise ValueError(f"no set is called {name!r} in {folder / SETS}.{nearest(name, names)}")
    stems = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    if not stems:
        raise ValueError(f"{path} is empty")
    return stems


def _read_xml(path: Path) -> dict[str, Any]:
    try:
        root = ElementTree.parse(path).getroot()
        objects = [
            (
                str(one.findtext("name", "")).strip(),
                int(one.findtext("difficult", "0").strip() or 0),
                [float(one.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")],
            )
            for one in root.iter("object")
        ]
        height, width = (int(root.findtext(f"size/{side}", "")) for side in ("height", "width"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(
            f"{path} is not an annotation like VOC's, with a size, and a name and bndbox an object: {error}"
        ) from error
    return {"xml": path, "height": height, "width": width, "objects": objects}
