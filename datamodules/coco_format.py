"""Annotations in COCO's format (arXiv:1405.0312, cocodataset.org/#format-data): checked, and kept as arrays.

Arrays, as dicts of all of COCO's annotations would be copied into every loading process, object by object. Masks are
polygons, or run lengths by column, plain (a list of counts) or compressed (a string); pycocotools reads them.
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

from retinue.utils.masks import run_lengths

logger = logging.getLogger(__name__)

PARTS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class CocoIndex:
    """A set of N images and their A annotations, which are sorted by image. Boxes are (x, y, width, height).

    Attributes:
        source: file or folder that it comes from, for messages.
        categories: the name of each category id, in the order of the labels: by id.
        ids: (N,) image ids; `sizes`: (N, 2) heights and widths; `files`: (N,) names of the files, as bytes.
        image: (A,) position of each annotation's image; `annotation_ids`: (A,); `labels`: (A,) from 0 up.
        boxes: float64 (A, 4); `areas`: (A,); `crowd`: bool (A,), where a box is around many objects.
        segmentations: uint8, all masks one after the other; `spans`: (A, 2) first byte of each and the one after it.
            None: not all annotations have one.
    """

    source: str
    categories: dict[int, str]
    ids: np.ndarray
    sizes: np.ndarray
    files: np.ndarray
    image: np.ndarray
    annotation_ids: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    segmentations: np.ndarray | None
    spans: np.ndarray

    @cached_property
    def starts(self) -> np.ndarray:
        """(N + 1,) The annotations of image i are those from starts[i] to starts[i + 1]."""
        return np.searchsorted(self.image, np.arange(len(self.ids) + 1))

    @cached_property
    def corners(self) -> np.ndarray:
        """float32 (A, 4): the boxes as (x1, y1, x2, y2), clipped to their images."""
        low = self.boxes[:, :2]
        limits = self.sizes[self.image][:, ::-1]
        return np.concatenate(
            [low.clip(0, limits), (low + self.boxes[:, 2:]).clip(0, limits)], axis=1, dtype=np.float32
        )

    @cached_property
    def degenerate(self) -> np.ndarray:
        """bool (A,): less than 1 px of its width or its height is inside the image."""
        return np.any(self.corners[:, 2:] - self.corners[:, :2] < 1, axis=1)

    def select(self, images: np.ndarray) -> "CocoIndex":
        """The set without the images that are False in `images` (N,)."""
        rows = images[self.image]
        per_image = {name: getattr(self, name)[images] for name in ("ids", "sizes", "files")}
        names = ("annotation_ids", "labels", "boxes", "areas", "crowd", "spans")
        per_annotation = {name: getattr(self, name)[rows] for name in names}
        image = (np.cumsum(images) - 1)[self.image[rows]]
        return replace(self, image=image, **per_image, **per_annotation)

    def segmentation(self, annotation: int) -> list | dict:
        """A mask as the file has it."""
        assert self.segmentations is not None
        start, end = self.spans[annotation]
        return marshal.loads(self.segmentations[start:end].tobytes())

    def masks(self, image: int, annotations: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 (M, H, W): the masks of some annotations of the image at a position.

        Raises:
            ValueError: one is of another size than its image.
        """
        height, width = self.sizes[image].tolist()
        if not len(annotations):
            return np.zeros((0, height, width), np.uint8)
        masks: list[np.ndarray] = []
        for annotation in annotations:
            try:
                masks.append(coco_mask.decode(run_lengths(self.segmentation(annotation), height, width)))
            except (KeyError, TypeError, ValueError) as error:
                where = f"{self.source}: annotation {self.annotation_ids[annotation]}"
                raise ValueError(f"{where} has a mask that cannot be read: {error}") from error
        return np.stack(masks)

    def to_coco(self) -> dict[str, list[dict]]:
        """All of it in COCO's format again."""
        images = [
            {"id": id, "height": height, "width": width, "file_name": file.decode()}
            for id, (height, width), file in zip(self.ids.tolist(), self.sizes.tolist(), self.files, strict=True)
        ]
        category_ids = list(self.categories)
        columns = (self.annotation_ids, self.ids[self.image], self.labels, self.boxes, self.areas, self.crowd)
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
        return {"images": images, "annotations": annotations, "categories": categories}


def read_coco(path: Path) -> CocoIndex:
    """The set in a JSON file.

    Raises:
        ValueError: it is not a COCO file, or what is in it does not fit together.
    """
    collecting = gc.isenabled()
    gc.disable()  # it would visit COCO's millions of objects over and over: 15 s instead of 6
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        return index_coco(content, str(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    finally:
        if collecting:
            gc.enable()


def index_coco(content: Any, source: str) -> CocoIndex:
    """The set in what a COCO file holds.

    Args:
        source: what to call it in messages.

    Raises:
        ValueError: it is not of COCO's format, has no images or no boxes, or names an unknown image or category.
    """
    if not (isinstance(content, Mapping) and all(isinstance(content.get(part), list) for part in PARTS)):
        raise ValueError(f"{source} is not a COCO file with boxes: expected lists called {', '.join(PARTS)}")
    images, annotations, categories = (_Entries(content[part], f"{source}: {part}") for part in PARTS)
    for entries in (images, annotations, categories):
        if not entries.entries:
            raise ValueError(f"{entries.name} is empty")

    category_ids = categories.ids("id")
    names = dict(sorted(zip(category_ids.tolist(), map(str, categories.column("name")), strict=True)))
    ids = images.ids("id")
    sizes = np.stack([images.ids("height", unique=False), images.ids("width", unique=False)], axis=1)
    if (sizes < 1).any():
        raise ValueError(f"{source}: image {ids[(sizes < 1).any(1)][0]} has no height or no width")

    of_image = annotations.places("image_id", ids, "an image")
    order = np.argsort(of_image, kind="stable")
    rows = annotations.entries
    boxes = annotations.boxes()[order]
    iscrowd = np.array([bool(row.get("iscrowd", 0)) for row in rows])
    areas = annotations.areas()[order]
    segmentations = [rows[row].get("segmentation") for row in order.tolist()]
    if any(segmentations) and not all(segmentations):
        without = f"{sum(not one for one in segmentations)} of {len(rows)} annotations have none"
        logger.warning("%s: masks are not used, as %s", source, without)
    blobs = [marshal.dumps(one) for one in segmentations] if all(segmentations) else []
    ends = np.cumsum([len(blob) for blob in blobs]) if blobs else np.zeros(len(rows), np.int64)
    index = CocoIndex(
        source=source,
        categories=names,
        ids=ids,
        sizes=sizes,
        files=np.array([str(name).encode() for name in images.column("file_name")]),
        image=of_image[order],
        annotation_ids=annotations.ids("id")[order],
        labels=annotations.places("category_id", np.array(list(names)), "a category")[order],
        boxes=boxes,
        areas=np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas),
        crowd=iscrowd[order],
        segmentations=np.frombuffer(b"".join(blobs), np.uint8) if blobs else None,
        spans=np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1),
    )
    if index.degenerate.all():
        raise ValueError(f"{source}: none of the {len(rows)} boxes [x, y, width, height] lies inside its image")
    return index


class _Entries:
    """A list of a COCO file, column by column."""

    def __init__(self, entries: list, name: str):
        self.entries, self.name = entries, name

    def column(self, key: str) -> list:
        try:
            return [entry[key] for entry in self.entries]
        except (KeyError, TypeError):
            bad = next(i for i, entry in enumerate(self.entries) if not isinstance(entry, dict) or key not in entry)
            raise ValueError(f"{self.name}[{bad}] has no {key!r}") from None

    def ids(self, key: str, unique: bool = True) -> np.ndarray:
        """A column of whole numbers, int64."""
        values = self.column(key)
        array = np.array(values) if all(isinstance(value, int) for value in values) else None
        if array is None or array.dtype.kind != "i":
            bad = next((value for value in values if not isinstance(value, int)), values[0])
            raise ValueError(f"{self.name}: {key!r} must be a whole number, not {bad!r}")
        if unique:
            found, count = np.unique(array, return_counts=True)
            if (count > 1).any():
                raise ValueError(f"{self.name}: {key!r} {found[count > 1][0]} occurs {count.max()} times")
        return array.astype(np.int64)

    def places(self, key: str, known: np.ndarray, what: str) -> np.ndarray:
        """The positions in `known` of a column of ids."""
        values = self.ids(key, unique=False)
        order = np.argsort(known)
        place = np.searchsorted(known, values, sorter=order).clip(max=len(known) - 1)
        unknown = known[order[place]] != values
        if unknown.any():
            bad = int(np.flatnonzero(unknown)[0])
            some = f": the ids are {', '.join(map(str, known[:10]))}{', ...' if len(known) > 10 else ''}"
            one = f"{self.name}[{bad}] (id {self.entries[bad].get('id')}) has {key!r} {values[bad]}"
            raise ValueError(f"{one}, which is not {what} of the file{some if len(known) <= 100 else ''}")
        return order[place]

    def boxes(self) -> np.ndarray:
        """float64 (A, 4)."""
        values = self.column("bbox")
        try:
            boxes = np.array(values, np.float64)
        except (TypeError, ValueError):
            boxes = np.zeros(0)
        if boxes.shape != (len(values), 4) or not np.isfinite(boxes).all():
            bad = next(i for i, value in enumerate(values) if not _is_box(value))
            one = f"{self.name}[{bad}] (id {self.entries[bad].get('id')})"
            raise ValueError(f"{one} has the bbox {values[bad]!r}: expected [x, y, width, height]")
        return boxes

    def areas(self) -> np.ndarray:
        """float64 (A,), NaN for an annotation without one."""
        values = [entry.get("area") for entry in self.entries]
        if wrong := [value for value in values if not isinstance(value, int | float | None)]:
            raise ValueError(f"{self.name}: 'area' must be a number, not {wrong[0]!r}")
        return np.array([np.nan if value is None else value for value in values], np.float64)


def _is_box(value: Any) -> bool:
    right = isinstance(value, list | tuple) and len(value) == 4
    return right and all(isinstance(side, int | float) and np.isfinite(side) for side in value)
