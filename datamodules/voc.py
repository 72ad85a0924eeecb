"""Pascal VOC (host.robots.ox.ac.uk/pascal/VOC), and any data set with annotations in VOC's XML format."""

import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from datamodules.base import SPLITS
from datamodules.coco_format import CocoIndex, index_coco
from datamodules.decode import BrokenImage, read_file, read_size
from datamodules.detection import DetectionData, check_classes, choose_names
from datamodules.images import EXTENSIONS
from datamodules.segmentation import MaskedImages, SegmentationData
from retinue.utils.masks import IGNORED
from retinue.utils.suggestions import nearest

# Folders of a VOC data set: the lists of images ("image sets"), the XML files and the images.
IMAGE_SETS, ANNOTATIONS, IMAGES = Path("ImageSets/Main"), "Annotations", "JPEGImages"
# Lists of the images that have a label for each pixel.
MASK_SETS = Path("ImageSets/Segmentation")
# Classes of VOC's masks, by value.
MASK_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
# Flag behind an image's name in the image sets of a class: the image has the class (1), has not (-1), is difficult (0).
CLASS_FLAG = re.compile(r"\s+(-1|0|1)$")


class VOC(DetectionData):
    """Folders with ImageSets/Main/<set>.txt, Annotations/<name>.xml and JPEGImages/<name>.jpg.

    An image set is a text file with one image name per line. Difficult objects are crowds in COCO's sense: training
    ignores them, and evaluation counts them neither as found nor as missed. A box includes the pixels of its four
    sides, and VOC counts pixels from 1: xmin..xmax covers x from xmin - 1 to xmax. Only boxes are read.

    Args:
        train: image sets of the training split; each is SET, or FOLDER/SET with a folder below `root`, such as
            [VOC2007/trainval, VOC2012/trainval].
        val: image sets of the validation split.
        test: image sets of the test split. None tests on the validation split.
        classes: names of the classes in the order of the labels; objects of other classes are left out. None takes the
            names in the training annotations, sorted, which is VOC's own order.
        common: arguments of `DetectionData`.

    Raises:
        ValueError: if an argument is a single name instead of a list. Loading raises it if a name in `classes`
            seems to be mistyped.
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
        self.image_sets = _check_sets(train, val, test)
        self.classes = check_classes(classes)

    @property
    def splits(self) -> Sequence[str]:
        return SPLITS if self.image_sets["test"] else SPLITS[:2]

    @cached_property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, by label."""
        found = (name for entry in self._entries("train") for name, _, _ in entry["objects"])
        return choose_names(self.classes, found)

    def read(self, split: str) -> tuple[CocoIndex, Path]:
        assert self.root is not None
        source = f"{self.root} ({', '.join(self._image_sets(split))})"
        labels = {name: label for label, name in enumerate(self.class_names)}
        images, annotations = [], []
        for position, entry in enumerate(self._entries(split)):
            images.append({"id": position, **{key: entry[key] for key in ("file_name", "height", "width")}})
            for name, difficult, (x1, y1, x2, y2) in entry["objects"]:
                if name not in labels and self.classes:
                    continue
                if name not in labels:
                    classes = ", ".join(self.class_names)
                    raise ValueError(f"{entry['xml']} has a {name!r}, which is none of the classes: {classes}")
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": position,
                        "category_id": labels[name],
                        "bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1],
                        "iscrowd": difficult,
                    }
                )
        categories = [{"id": label, "name": name} for name, label in labels.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        return index_coco(content, source), self.root

    def _image_sets(self, split: str) -> Sequence[str]:
        names = self.image_sets[split]
        return () if names is None else names

    def _entries(self, split: str) -> list[dict[str, Any]]:
        """Return `file_name`, `height`, `width`, `xml` and `objects` of each image; see `_read_xml`."""
        assert self.root is not None
        entries = []
        for name in self._image_sets(split):
            parent, set_name = os.path.split(name)
            folder = self.root / parent
            for image in _list_image_set(folder, IMAGE_SETS / f"{set_name}.txt"):
                entry = _read_xml(folder / ANNOTATIONS / f"{image.stem}.xml", image)
                entries.append(entry | {"file_name": os.path.join(parent, IMAGES, image.name)})
        return entries


class VOCSegmentation(SegmentationData):
    """Folders with ImageSets/Segmentation/<set>.txt, JPEGImages/<name>.jpg and SegmentationClass/<name>.png.

    A mask is a PNG with a palette or with one channel; its values are the classes, and 255 is ignored. The classes are
    VOC's 21 unless `classes` names others.

    Args:
        train: image sets of the training split, as in `VOC`.
        val: image sets of the validation split.
        test: image sets of the test split. None tests on the validation split.
        masks: folders of the masks beside JPEGImages; the first one that has a mask of the image is used. With SBD's
            masks (Hariharan et al., ICCV 2011) they are [SegmentationClass, SegmentationClassAug].
        classes: names of the classes, by mask value.
        common: arguments of `SegmentationData`.

    Raises:
        ValueError: if an argument is a single name instead of a list.
    """

    def __init__(
        self,
        *,
        train: Sequence[str] = ("train",),
        val: Sequence[str] = ("val",),
        test: Sequence[str] | None = None,
        masks: Sequence[str] = ("SegmentationClass",),
        classes: Sequence[str] | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        self.image_sets = _check_sets(train, val, test)
        if isinstance(masks, str):
            raise ValueError(f"data.masks must be a list of folders, like [{masks}], not {masks!r}")
        self.mask_folders = masks
        names = check_classes(classes)
        self.class_names = MASK_CLASSES if names is None else names
        if len(self.class_names) > IGNORED:
            raise ValueError(f"data.classes must be 1 to {IGNORED} classes, not {len(self.class_names)}")

    @property
    def splits(self) -> Sequence[str]:
        return SPLITS if self.image_sets["test"] else SPLITS[:2]

    def load(self, split: str) -> MaskedImages:
        assert self.root is not None
        pairs = []
        for name in self.image_sets[split] or ():
            parent, set_name = os.path.split(name)
            folder = self.root / parent
            listed = {masks: set(_list_files(folder / masks)) for masks in self.mask_folders}
            for image in _list_image_set(folder, MASK_SETS / f"{set_name}.txt"):
                mask = f"{image.stem}.png"
                masks = next((masks for masks in self.mask_folders if mask in listed[masks]), None)
                if masks is None:
                    folders = " or ".join(str(folder / masks) for masks in self.mask_folders)
                    raise ValueError(f"{image.stem} of {folder / MASK_SETS / set_name}.txt has no mask in {folders}")
                pairs.append((os.path.join(parent, IMAGES, image.name), os.path.join(parent, masks, mask)))
        values = {label: label for label in range(len(self.class_names))}
        return MaskedImages(self.root, self.root, pairs, values)


def _check_sets(
    train: Sequence[str], val: Sequence[str], test: Sequence[str] | None
) -> dict[str, Sequence[str] | None]:
    """Return the image sets of each split.

    Raises:
        ValueError: if the sets of a split are a single name instead of a list.
    """
    sets = {"train": train, "val": val, "test": test}
    for split, names in sets.items():
        if isinstance(names, str):
            raise ValueError(f"data.{split} must be a list of image sets, like [{names}], not {names!r}")
    return sets


def _list_image_set(folder: Path, image_set: Path) -> list[Path]:
    """Return the image files that a list names.

    Args:
        folder: folder with JPEGImages and ImageSets.
        image_set: the list, relative to `folder`.
    """
    files = {Path(file).stem: file for file in _list_files(folder / IMAGES) if file.lower().endswith(EXTENSIONS)}
    images = []
    for line in _read_image_set(folder, image_set):
        # The image sets of a class, such as cat_train.txt, have a flag behind the name.
        stem = line if line in files else CLASS_FLAG.sub("", line)
        if stem not in files:
            raise ValueError(f"{stem} of {folder / image_set} has no image in {folder / IMAGES}")
        images.append(folder / IMAGES / files[stem])
    return images


def _list_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        root = folder.parents[1] if folder.parent.name == "ImageSets" else folder.parent
        raise ValueError(f"{folder} is missing: expected the folders of Pascal VOC in {root}, such as {IMAGES}")
    return os.listdir(folder)


def _read_image_set(folder: Path, image_set: Path) -> list[str]:
    """Return the lines of a list, which are names of images; they may have spaces."""
    path = folder / image_set
    if not path.is_file():
        names = sorted(file.removesuffix(".txt") for file in _list_files(path.parent) if file.endswith(".txt"))
        raise ValueError(f"no image set is called {path.stem!r} in {path.parent}.{nearest(path.stem, names)}")
    text = path.read_text(encoding="utf-8-sig")
    if not (lines := [line.strip() for line in text.splitlines() if line.strip()]):
        raise ValueError(f"{path} is empty")
    return lines


def _read_xml(path: Path, image: Path) -> dict[str, Any]:
    """Read an XML file: `xml` (its path), `height`, `width`, and `objects`, a list of (class, difficult, corners).

    The height and the width of an annotation without a size, or with a size of 0, are those of the file `image`.
    """
    try:
        root = ElementTree.fromstring(read_file(path))
        objects = [
            (
                str(element.findtext("name", "")).strip(),
                _read_flag(element, "difficult"),
                [float(element.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")],
            )
            for element in root.iter("object")
        ]
        height, width = (int(float(root.findtext(f"size/{side}", 0) or 0)) for side in ("height", "width"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except BrokenImage as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(
            f"{path} is not an annotation like VOC's, with a name and bndbox for each object: {error}"
        ) from error
    if min(height, width) == 0:
        try:
            height, width = read_size(image)
        except BrokenImage as error:
            raise ValueError(f"{path} has no size, and {image} cannot be read: {error}") from error
    return {"xml": path, "height": height, "width": width, "objects": objects}


def _read_flag(element: ElementTree.Element, name: str) -> int:
    """Return the 0 or 1 of a child element; 0 if the child is missing, empty or "Unspecified"."""
    text = element.findtext(name, "").strip()
    return 0 if text in ("", "Unspecified") else int(text)
