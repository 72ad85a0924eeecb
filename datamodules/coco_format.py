"""Annotations in COCO's format (arXiv:1405.0312, cocodataset.org/#format-data), checked and kept as arrays.

Arrays are used because the dicts of all of COCO's annotations would be copied into every loading process, object by
object. Masks are polygons or run lengths by column, either plain (a list of counts) or compressed (a string);
pycocotools decodes them.
"""

import gc
import json
import logging
import marshal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pytorch_lightning.utilities import rank_zero_only

from datamodules.federated import Federated, read_federated
from retinue.utils.coco_masks import encloses_pixels, run_lengths
from retinue.utils.suggestions import nearest

logger = logging.getLogger(__name__)
# Every process of a run reads the data, so only the first one says what it finds.
warn = rank_zero_only(logger.warning)

# Smallest share of boxes beyond their images at which boxes are taken for [x1, y1, x2, y2].
MIN_SHARE_BEYOND = 0.1
# Lists that a COCO file with boxes has.
COCO_LISTS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class CocoIndex:
    """Annotations of a data set with N images and A annotations, which are sorted by image.

    Attributes:
        source: file or folder that the annotations come from, for messages.
        categories: name of each category id, sorted by id, which is the order of the labels.
        ids: int64 (N,), image ids.
        sizes: int64 (N, 2), height and width of each image.
        files: (N,) names of the image files, as bytes.
        image_index: int64 (A,), position of each annotation's image.
        annotation_ids: int64 (A,), ids of the annotations.
        labels: int64 (A,), 0 to K - 1.
        boxes: float64 (A, 4), (x, y, width, height) in pixels.
        areas: float64 (A,), areas of the objects in pixels.
        crowd: bool (A,), whether a box surrounds a crowd, which is many objects at once.
        unused: bool (A,), whether training leaves the annotation out, as mmdetection does: it has `ignore`, or an area
            of 0 or less.
        maskless: bool (A,), whether the annotation's mask is empty or has no polygon with three corners.
        segmentations: uint8, all masks in marshal's format, one after another. None means that some annotation has no
            mask, or all are without pixels.
        spans: int64 (A, 2), first byte of each mask in `segmentations` and the byte after its last one.
        federated: the categories that were looked for in each image, if the file is LVIS's. None means all categories.
    """

    source: str
    categories: dict[int, str]
    ids: np.ndarray
    sizes: np.ndarray
    files: np.ndarray
    image_index: np.ndarray
    annotation_ids: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    unused: np.ndarray
    maskless: np.ndarray
    segmentations: np.ndarray | None
    spans: np.ndarray
    federated: Federated | None = None

    @cached_property
    def starts(self) -> np.ndarray:
        """Offsets (N + 1,): the annotations of image i are those from starts[i] up to, not including, starts[i + 1]."""
        return np.searchsorted(self.image_index, np.arange(len(self.ids) + 1))

    @cached_property
    def corners(self) -> np.ndarray:
        """Boxes, float32 (A, 4), as (x1, y1, x2, y2), clipped to their images."""
        low = self.boxes[:, :2]
        limits = self.sizes[self.image_index][:, ::-1]
        return np.concatenate(
            [low.clip(0, limits), (low + self.boxes[:, 2:]).clip(0, limits)], axis=1, dtype=np.float32
        )

    @cached_property
    def degenerate(self) -> np.ndarray:
        """Array (A,) of bool, whether less than 1 px of a box's width or height is inside its image."""
        return np.any(self.corners[:, 2:] - self.corners[:, :2] < 1, axis=1)

    def select(self, images: np.ndarray) -> "CocoIndex":
        """Return the images for which `images`, bool (N,), is True, with their annotations."""
        rows = images[self.image_index]
        per_image = {name: getattr(self, name)[images] for name in ("ids", "sizes", "files")}
        names = ("annotation_ids", "labels", "boxes", "areas", "crowd", "unused", "maskless", "spans")
        per_annotation = {name: getattr(self, name)[rows] for name in names}
        image_index = (np.cumsum(images) - 1)[self.image_index[rows]]
        federated = None if self.federated is None else self.federated.select(images)
        return replace(self, image_index=image_index, federated=federated, **per_image, **per_annotation)

    def segmentation(self, annotation: int) -> list | dict:
        """Return the mask of an annotation in the form that the file has."""
        assert self.segmentations is not None
        start, end = self.spans[annotation]
        return marshal.loads(self.segmentations[start:end].tobytes())

    def masks(self, image: int, annotations: Sequence[int] | np.ndarray) -> np.ndarray:
        """Decode masks of one image.

        Args:
            image: position of the image.
            annotations: (M,) rows of annotations of this image.

        Returns:
            uint8 (M, H, W), 1 inside the objects.

        Raises:
            ValueError: if a mask is malformed or has another size than its image.
        """
        height, width = self.sizes[image].tolist()
        if not len(annotations):
            return np.zeros((0, height, width), np.uint8)
        masks: list[np.ndarray] = []
        for annotation in annotations:
            try:
                masks.append(coco_mask.decode(run_lengths(self.segmentation(annotation), height, width)))
            except (KeyError, TypeError, ValueError) as error:
                location = f"{self.source}: annotation {self.annotation_ids[annotation]}"
                raise ValueError(f"{location} has a mask that cannot be read: {error}") from error
        return np.stack(masks)

    def to_coco(self) -> dict[str, list[dict]]:
        """Return all images, annotations and categories in COCO's format."""
        images = [
            {"id": id, "height": height, "width": width, "file_name": file.decode()}
            for id, (height, width), file in zip(self.ids.tolist(), self.sizes.tolist(), self.files, strict=True)
        ]
        category_ids = list(self.categories)
        columns = (self.annotation_ids, self.ids[self.image_index], self.labels, self.boxes, self.areas, self.crowd)
        annotations = [
            {
                "id": id,
                "image_id": image_id,
                "category_id": category_ids[label],
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for id, image_id, label, box, area, crowd in zip(*(column.tolist() for column in columns), strict=True)
        ]
        if self.segmentations is not None:
            for row, annotation in enumerate(annotations):
                annotation["segmentation"] = self.segmentation(row)
        categories = [{"id": id, "name": name} for id, name in self.categories.items()]
        if self.federated is not None:
            self.federated.add_to(images, categories)
        return {"images": images, "annotations": annotations, "categories": categories}


def read_coco(path: Path, classes: Sequence[str] | None = None) -> CocoIndex:
    """Read the annotations in a JSON file.

    Args:
        path: the file.
        classes: names of the categories to keep; see `index_coco`.

    Raises:
        ValueError: if the file is not in COCO's format, or its content is inconsistent.
    """
    gc_was_enabled = gc.isenabled()
    # The garbage collector would visit COCO's millions of objects again and again: 15 s instead of 6 s.
    gc.disable()
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
        return index_coco(content, str(path), classes)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    finally:
        if gc_was_enabled:
            gc.enable()


def index_coco(content: Any, source: str, classes: Sequence[str] | None = None) -> CocoIndex:
    """Check the content of a COCO file and convert it to arrays.

    Args:
        content: the parsed file.
        source: name of the file or folder, for messages.
        classes: names of the categories to keep; annotations of other categories are left out. None keeps all.

    Raises:
        ValueError: if the content is not in COCO's format, has no images or no boxes, or refers to an unknown image or
            category.
    """
    if not (isinstance(content, Mapping) and all(isinstance(content.get(name), list) for name in COCO_LISTS)):
        raise ValueError(f"{source} is not a COCO file with boxes: expected lists called {', '.join(COCO_LISTS)}")
    images, annotations, categories = (_Entries(content[name], f"{source}: {name}") for name in COCO_LISTS)
    for entries in (images, annotations, categories):
        if not entries.entries:
            raise ValueError(f"{entries.name} is empty")

    category_ids = categories.unique_integers("id")
    names = dict(sorted(zip(category_ids.tolist(), map(str, categories.column("name")), strict=True)))
    ids = images.unique_integers("id")
    sizes = np.stack([images.integers("height"), images.integers("width")], axis=1)
    if (sizes < 1).any():
        raise ValueError(f"{source}: image {ids[(sizes < 1).any(1)][0]} has no height or no width")

    labels = annotations.positions("category_id", np.array(list(names)), "a category")
    if classes is not None:
        names, kept = _select_categories(names, classes, source)
        annotations = annotations.select(np.isin(labels, kept))
        if not annotations.entries:
            raise ValueError(f"{source} has no annotation of data.classes={list(classes)}")
        labels = annotations.positions("category_id", np.array(list(names)), "a category")

    image_index = annotations.positions("image_id", ids, "an image")
    order = np.argsort(image_index, kind="stable")
    rows = annotations.entries
    boxes = annotations.boxes()[order]
    crowd = np.array([bool(row.get("iscrowd", 0)) for row in rows])
    areas = annotations.areas()[order]
    segmentations = [rows[row].get("segmentation") for row in order.tolist()]
    maskless = np.array([not encloses_pixels(segmentation) for segmentation in segmentations], bool)
    missing = sum(segmentation is None for segmentation in segmentations)
    if missing and not maskless.all():
        warn("%s: masks are not used, because %d of %d annotations have none", source, missing, len(rows))
    has_masks = not missing and not maskless.all()
    blobs = [marshal.dumps(segmentation) for segmentation in segmentations] if has_masks else []
    ends = np.cumsum([len(blob) for blob in blobs]) if blobs else np.zeros(len(rows), np.int64)
    index = CocoIndex(
        source=source,
        categories=names,
        ids=ids,
        sizes=sizes,
        files=np.array([name.encode() for name in images.file_names()]),
        image_index=image_index[order],
        annotation_ids=annotations.unique_integers("id")[order],
        labels=labels[order],
        boxes=boxes,
        areas=np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas),
        crowd=crowd[order],
        unused=np.array([bool(rows[row].get("ignore", 0)) for row in order.tolist()], bool) | (areas <= 0),
        maskless=maskless,
        segmentations=np.frombuffer(b"".join(blobs), np.uint8) if blobs else None,
        spans=np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1),
        federated=read_federated(
            images.entries, categories.entries, {id: label for label, id in enumerate(names)}, source
        ),
    )
    if index.degenerate.all():
        raise ValueError(f"{source}: none of the {len(rows)} boxes [x, y, width, height] lies inside its image")
    _warn_of_corners(index)
    return index


def _select_categories(names: dict[int, str], classes: Sequence[str], source: str) -> tuple[dict[int, str], list[int]]:
    """Return the categories called `classes` in the order of their ids, and their labels among all of `names`."""
    for name in classes:
        if name not in names.values():
            raise ValueError(
                f"data.classes has {name!r}, which is no category of {source}.{nearest(name, names.values())}"
            )
    kept = [label for label, name in enumerate(names.values()) if name in classes]
    return {id: name for id, name in names.items() if name in classes}, kept


def _warn_of_corners(index: CocoIndex) -> None:
    """Log a warning if the boxes are plainly [x1, y1, x2, y2] instead of COCO's [x, y, width, height].

    All boxes are then inside their images if read as two corners, and many reach beyond them if read as COCO's.
    """
    limits = index.sizes[index.image_index][:, ::-1]
    low, high = index.boxes[:, :2], index.boxes[:, 2:]
    fit_as_corners = ((low >= 0) & (low < high) & (high <= limits + 1)).all()
    beyond = np.any(low + high > limits + 1, axis=1)
    if fit_as_corners and beyond.mean() >= MIN_SHARE_BEYOND:
        warn(
            "%s: the boxes seem to be [x1, y1, x2, y2], but COCO's are [x, y, width, height]: %d of %d reach beyond "
            "their images, and all are inside if read as two corners",
            index.source, beyond.sum(), len(beyond),
        )  # fmt: skip


class _Entries:
    """Columns of a list in a COCO file, checked when they are read.

    Args:
        entries: the list.
        name: file and list, for messages.
    """

    def __init__(self, entries: list, name: str):
        self.entries, self.name = entries, name

    def select(self, rows: np.ndarray) -> "_Entries":
        """Return the entries for which `rows`, bool (N,), is True."""
        return _Entries([entry for entry, kept in zip(self.entries, rows.tolist(), strict=True) if kept], self.name)

    def column(self, key: str) -> list:
        """Return the value of `key` in each entry."""
        try:
            return [entry[key] for entry in self.entries]
        except (KeyError, TypeError):
            row = next(i for i, entry in enumerate(self.entries) if not isinstance(entry, dict) or key not in entry)
            raise ValueError(f"{self.name}[{row}] has no {key!r}") from None

    def file_names(self) -> list[str]:
        """Return the name of each image's file: `file_name`, or in LVIS the folder and the file in `coco_url`."""
        if all("coco_url" in entry and "file_name" not in entry for entry in self.entries):
            return ["/".join(str(url).split("/")[-2:]) for url in self.column("coco_url")]
        return [str(name) for name in self.column("file_name")]

    def integers(self, key: str) -> np.ndarray:
        """Return a column of whole numbers, int64."""
        values = self.column(key)
        array = np.array(values) if all(isinstance(value, int) for value in values) else None
        if array is None or array.dtype.kind != "i":
            invalid = next((value for value in values if not isinstance(value, int)), values[0])
            raise ValueError(f"{self.name}: {key!r} must be a whole number, not {invalid!r}")
        return array.astype(np.int64)

    def unique_integers(self, key: str) -> np.ndarray:
        """Return a column of whole numbers, int64, which must all differ."""
        array = self.integers(key)
        values, counts = np.unique(array, return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"{self.name}: {key!r} {values[counts > 1][0]} occurs {counts.max()} times")
        return array

    def positions(self, key: str, ids: np.ndarray, what: str) -> np.ndarray:
        """Return the position in `ids` of each value of a column; `what` names an entry of `ids` in messages."""
        values = self.integers(key)
        order = np.argsort(ids)
        sorted_positions = np.searchsorted(ids, values, sorter=order).clip(max=len(ids) - 1)
        unknown = ids[order[sorted_positions]] != values
        if unknown.any():
            row = int(np.flatnonzero(unknown)[0])
            hint = ""
            if len(ids) <= 100:
                hint = f": the ids are {', '.join(map(str, ids[:10]))}{', ...' if len(ids) > 10 else ''}"
            raise ValueError(f"{self._row(row)} has {key!r} {values[row]}, which is not {what} of the file{hint}")
        return order[sorted_positions]

    def boxes(self) -> np.ndarray:
        """Return the boxes, float64 (A, 4)."""
        values = self.column("bbox")
        try:
            boxes = np.array(values, np.float64)
        except (TypeError, ValueError):
            boxes = np.zeros(0)
        if boxes.shape != (len(values), 4) or not np.isfinite(boxes).all():
            row = next(i for i, value in enumerate(values) if not _is_box(value))
            raise ValueError(f"{self._row(row)} has the bbox {values[row]!r}: expected [x, y, width, height]")
        return boxes

    def areas(self) -> np.ndarray:
        """Return the areas, float64 (A,), NaN for an annotation without an area."""
        values = [entry.get("area") for entry in self.entries]
        if invalid := [value for value in values if not isinstance(value, int | float | None)]:
            raise ValueError(f"{self.name}: 'area' must be a number, not {invalid[0]!r}")
        return np.array([np.nan if value is None else value for value in values], np.float64)

    def _row(self, row: int) -> str:
        return f"{self.name}[{row}] (id {self.entries[row].get('id')})"


def _is_box(value: Any) -> bool:
    has_four = isinstance(value, list | tuple) and len(value) == 4
    return has_four and all(isinstance(side, int | float) and np.isfinite(side) for side in value)
