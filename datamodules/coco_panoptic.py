"""Panoptic segmentation in COCO's format: every pixel belongs to one segment, an object or a region of stuff.

Format: Panoptic Segmentation (Kirillov et al., CVPR 2019, arXiv:1801.00868) and cocodataset.org/#format-data. A JSON
file lists the segments of each image, and a PNG of each image has the id of the segment at each pixel, R + 256 G +
65536 B; 0 is no segment (void).
"""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.base import SPLITS
from datamodules.classes import Classes
from datamodules.coco_format import CocoIndex, index_coco
from datamodules.decode import BrokenImage, check_pixels, read_file
from datamodules.detection import DetectionData, check_files


@dataclass(frozen=True, kw_only=True)
class PanopticIndex(CocoIndex):
    """Segments of a data set as the annotations of a `CocoIndex`; their masks are read from PNG files.

    The labels are those of the things and then those of the stuff, each in the order of the category ids.

    Attributes:
        num_things: number of the classes that are things.
        segment_ids: int64 (A,), id of each segment in its image's PNG.
        mask_folder: folder of the PNGs.
        mask_files: (N,) names of the PNGs, as bytes.
    """

    num_things: int
    segment_ids: np.ndarray
    mask_folder: Path
    mask_files: np.ndarray

    def select(self, images: np.ndarray) -> "PanopticIndex":
        selected: Any = super().select(images)
        rows = images[self.image_index]
        return replace(selected, segment_ids=self.segment_ids[rows], mask_files=self.mask_files[images])

    def segment_map(self, image: int) -> np.ndarray:
        """Return the id of the segment at each pixel of an image, int64 (H, W); 0 is void.

        Raises:
            BrokenImage: if the PNG cannot be read.
            ValueError: if it has another size than the image, or other than three channels.
        """
        path = os.path.join(self.mask_folder, self.mask_files[image].decode())
        try:
            with Image.open(io.BytesIO(read_file(path))) as file:
                check_pixels(*file.size)
                values = np.array(file)
        except Exception as error:
            # Pillow's decoders raise errors of many types.
            raise BrokenImage(f"its segments {path}: {error}") from error
        expected = (*self.sizes[image].tolist(), 3)
        if values.shape != expected:
            raise ValueError(f"{path} must be an RGB image of {expected[1]} x {expected[0]} px: it is {values.shape}")
        return segment_ids(values)

    def masks(self, image: int, annotations: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = self.segment_ids[np.asarray(annotations, np.int64)]
        return (self.segment_map(image) == ids[:, None, None]).astype(np.uint8)


def segment_ids(colours: np.ndarray) -> np.ndarray:
    """Return the id of the segment at each pixel, int64 (H, W), from the colours of a PNG, uint8 (H, W, 3)."""
    return colours.astype(np.int64) @ np.array([1, 256, 65536])


def read_panoptic(path: Path, mask_folder: Path) -> PanopticIndex:
    """Read the segments in a panoptic JSON file of COCO's.

    Args:
        path: the file.
        mask_folder: folder of the PNGs.

    Raises:
        ValueError: if the file is not in this format, its content is inconsistent, or a PNG is missing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    try:
        things = {row["id"]: bool(row["isthing"]) for row in content["categories"]}
        files = {row["image_id"]: str(row["file_name"]) for row in content["annotations"]}
        segments = [
            {**segment, "image_id": row["image_id"], "segment_id": segment["id"]}
            for row in content["annotations"]
            for segment in row["segments_info"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a panoptic COCO file: categories have id and isthing, annotations have image_id, file_name "
            f"and segments_info, and segments have id; there is no {error}"
        ) from error
    # The ids of the segments differ within an image only.
    flat = [segment | {"id": i} for i, segment in enumerate(segments)]
    index = index_coco({**content, "annotations": flat}, str(path))
    if missing := [id for id in index.ids.tolist() if id not in files]:
        raise ValueError(f"{path}: image {missing[0]} has no annotation")

    # Labels of `index` in the order of our labels: things first.
    order = sorted(range(len(index.categories)), key=lambda label: not things[list(index.categories)[label]])
    categories = [list(index.categories.items())[label] for label in order]
    panoptic = PanopticIndex(
        **{field.name: getattr(index, field.name) for field in fields(index)}
        | {
            "categories": dict(categories),
            "labels": np.argsort(order)[index.labels],
            "maskless": np.zeros(len(flat), bool),
            # Every segment has a mask, though not in this array.
            "segmentations": np.zeros(0, np.uint8),
        },
        num_things=sum(things[id] for id, _ in categories),
        segment_ids=np.array([segments[row]["segment_id"] for row in index.annotation_ids.tolist()], np.int64),
        mask_folder=mask_folder,
        mask_files=np.array([files[id].encode() for id in index.ids.tolist()]),
    )
    check_files(replace(panoptic, files=panoptic.mask_files), mask_folder)
    return panoptic


class CocoPanoptic(DetectionData):
    """Images in folders, with one panoptic JSON file and one folder of PNGs per split.

    Training samples have the masks of all segments, things and stuff, except for crowds. Without annotations for
    testing, the test split is the validation split.

    Args:
        train_annotations: panoptic JSON file, relative to `root`. The PNGs are in the folder of the same name without
            its suffix.
        train_images: folder that the `file_name`s of the images are relative to; itself relative to `root`.
        val_annotations: as `train_annotations`, for validation.
        val_images: as `train_images`, for validation.
        test_annotations: as `train_annotations`, for testing. None means no test split.
        test_images: as `train_images`, for testing.
        common: arguments of `DetectionData`.
    """

    def __init__(
        self,
        *,
        train_annotations: str,
        train_images: str,
        val_annotations: str,
        val_images: str,
        test_annotations: str | None = None,
        test_images: str | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        self.annotation_files = {"train": train_annotations, "val": val_annotations, "test": test_annotations}
        self.image_folders = {"train": train_images, "val": val_images, "test": test_images}

    @property
    def splits(self) -> Sequence[str]:
        return SPLITS if self.annotation_files["test"] else SPLITS[:2]

    @property
    def num_things(self) -> int:
        """Number of the classes that are things; they come first."""
        index: Any = self._val_index
        return index.num_things

    @property
    def classes_of_net(self) -> Classes:
        return replace(super().classes_of_net, num_things=self.num_things)

    def read(self, split: str) -> tuple[PanopticIndex, Path]:
        assert self.root is not None
        if not self.image_folders[split]:
            raise ValueError(f"data.{split}_images is needed")
        annotations = self.root / str(self.annotation_files[split])
        folder, masks = self.root / str(self.image_folders[split]), annotations.with_suffix("")
        if not annotations.is_file():
            raise ValueError(f"data.{split}_annotations: there is no file {annotations}")
        for path in (folder, masks):
            if not path.is_dir():
                raise ValueError(f"there is no folder {path}")
        index = read_panoptic(annotations, masks)
        if split != "val" and list(index.categories) != list(self._val_index.categories):
            raise ValueError(f"{annotations} has other categories, or other things, than {self._val_index.source}")
        return index, folder
