"""BDD100K (Yu et al., arXiv:1805.04687): 70,000 / 10,000 images of streets; boxes, weather, scene and time of day.

The classes and their other names are those of the authors' repository (bdd100k/bdd100k, BSD 3-Clause).
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.base import ClassificationData
from datamodules.coco_format import CocoIndex, index_coco
from datamodules.detection import DetectionData, check_classes, image_entry
from datamodules.images import FileImages
from retinue.utils.suggestions import nearest

# Classes in the order of the labels; their ids are 1 to 10.
CLASSES = (
    "pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle", "traffic light", "traffic sign",
)  # fmt: skip
# Names of the classes in the files of 2018, and rare vehicles.
SYNONYMS = {"person": "pedestrian", "motor": "motorcycle", "bike": "bicycle", "caravan": "car", "van": "car"}
# Objects that look like those of a class and are none: detections of the class on them are neither right nor wrong.
IGNORED = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}
# Values of the attributes of an image. Images without the attribute have "undefined".
ATTRIBUTES = {
    "weather": ("clear", "foggy", "overcast", "partly cloudy", "rainy", "snowy"),
    "scene": ("city street", "gas stations", "highway", "parking lot", "residential", "tunnel"),
    "timeofday": ("dawn/dusk", "daytime", "night"),
}


class BDD100K(DetectionData):
    """Images in folders, with one JSON file per split: a list of images with `name`, `attributes` and `labels`.

    The files of 2018 (bdd100k_labels_images_train.json) and of 2020 (det_20/det_train.json) are read. A box includes
    the pixels of its four sides. Objects with the attribute `crowd`, other persons, other vehicles and trailers are
    crowds in COCO's sense. Lanes and areas are left out. The test split is the validation split, because the labels of
    the test set are not public.

    Args:
        train_labels: JSON file, relative to `root`.
        train_images: folder of the images, relative to `root`.
        val_labels: as `train_labels`, for validation.
        val_images: as `train_images`, for validation.
        classes: names of the classes to train on and to evaluate; objects of others are left out. None takes all.
        common: arguments of `DetectionData`.

    Raises:
        ValueError: if `classes` is a single name instead of a list. Loading raises it if a file is not as described.
    """

    def __init__(
        self,
        *,
        train_labels: str,
        train_images: str,
        val_labels: str,
        val_images: str,
        classes: Sequence[str] | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        self.classes = check_classes(classes)
        self.label_files = {"train": train_labels, "val": val_labels}
        self.image_folders = {"train": train_images, "val": val_images}

    @property
    def splits(self) -> Sequence[str]:
        return ("train", "val")

    def read(self, split: str) -> tuple[CocoIndex, Path]:
        assert self.root is not None
        path, folder = self.root / self.label_files[split], self.root / self.image_folders[split]
        ids = {name: id for id, name in enumerate(CLASSES, 1)}
        images, annotations = [], []
        for position, frame in enumerate(read_frames(path)):
            images.append(image_entry(position, folder, frame["name"]))
            for label in frame.get("labels") or ():
                if not label.get("box2d"):
                    continue
                name = str(label.get("category"))
                name = SYNONYMS.get(name, name)
                category = IGNORED.get(name, name)
                if category not in ids:
                    hint = nearest(category, ids)
                    raise ValueError(f"{path}: {frame['name']} has a {category!r}, which is no class of BDD100K.{hint}")
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": position,
                        "category_id": ids[category],
                        "bbox": _bbox(label["box2d"], f"{path}: {frame['name']}"),
                        "iscrowd": int(name in IGNORED or bool((label.get("attributes") or {}).get("crowd"))),
                    }
                )
        categories = [{"id": id, "name": name} for name, id in ids.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        return index_coco(content, str(path), self.classes), folder


class BDD100KAttributes(ClassificationData):
    """Classification of BDD100K's images by an attribute; images whose attribute is undefined are left out.

    Args:
        attribute: weather, scene or timeofday.
        train_labels: JSON file, relative to `root`.
        train_images: folder of the images, relative to `root`.
        val_labels: as `train_labels`, for validation.
        val_images: as `train_images`, for validation.
        common: arguments of `ClassificationData`.

    Raises:
        ValueError: if there is no such attribute. Loading raises it if a file is not as described.
    """

    def __init__(
        self,
        *,
        attribute: str = "weather",
        train_labels: str,
        train_images: str,
        val_labels: str,
        val_images: str,
        **common: Any,
    ):
        super().__init__(**common)
        if attribute not in ATTRIBUTES:
            raise ValueError(
                f"data.attribute must be {', '.join(ATTRIBUTES)}, not {attribute!r}.{nearest(attribute, ATTRIBUTES)}"
            )
        self.attribute, self.class_names = attribute, ATTRIBUTES[attribute]
        self.label_files = {"train": train_labels, "val": val_labels}
        self.image_folders = {"train": train_images, "val": val_images}

    @property
    def splits(self) -> Sequence[str]:
        return ("train", "val")

    def load(self, split: str) -> FileImages:
        assert self.root is not None
        path, folder = self.root / self.label_files[split], self.root / self.image_folders[split]
        names, labels = [], []
        for frame in read_frames(path):
            value = (frame.get("attributes") or {}).get(self.attribute, "undefined")
            if value == "undefined":
                continue
            if value not in self.class_names:
                hint = nearest(str(value), self.class_names)
                raise ValueError(f"{path}: {frame['name']} has the {self.attribute} {value!r}, which is unknown.{hint}")
            names.append(frame["name"])
            labels.append(self.class_names.index(value))
        if not names:
            raise ValueError(f"{path}: no image has the attribute {self.attribute}")
        listed = set(os.listdir(folder)) if folder.is_dir() else set()
        if missing := [name for name in names if name not in listed]:
            raise ValueError(f"{len(missing)} of {len(names)} images of {path} are missing, like {folder / missing[0]}")
        return FileImages(folder, names, labels)


def read_frames(path: Path) -> list[dict[str, Any]]:
    """Return the images in a JSON file of labels.

    Raises:
        ValueError: if there is no such file, or it is not as described in `BDD100K`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    # Scalabel writes either a list or a mapping that has it.
    frames = content.get("frames") if isinstance(content, dict) else content
    if not (isinstance(frames, list) and frames and all(isinstance(f, dict) and "name" in f for f in frames)):
        raise ValueError(f"{path} is not a file of BDD100K: expected a list of images, each with a name")
    return frames


def _bbox(box: Any, where: str) -> list[float]:
    """Return COCO's box (x, y, width, height) for BDD100K's."""
    try:
        x1, y1, x2, y2 = (float(box[side]) for side in ("x1", "y1", "x2", "y2"))
    except (KeyError, TypeError, ValueError):
        x1 = y1 = x2 = y2 = np.nan
    if not (x1 <= x2 and y1 <= y2):
        raise ValueError(f"{where} has the box2d {box!r}: expected numbers x1 <= x2 and y1 <= y2")
    return [x1, y1, x2 - x1 + 1, y2 - y1 + 1]
