"""COCO (arXiv:1405.0312), PIDray, and any other data set in COCO's format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.base import SPLITS
from datamodules.coco_format import CocoIndex, read_coco
from datamodules.detection import DetectionData, check_classes


class Coco(DetectionData):
    """Images in folders, with one JSON file of annotations per split.

    Masks are used if every annotation has one; heads with masks ignore an object whose mask is empty. Without
    annotations for testing, the test split is the validation split.

    Args:
        train_annotations: JSON file, relative to `root`.
        train_images: folder that the `file_name`s in `train_annotations` are relative to; itself relative to `root`.
        val_annotations: as `train_annotations`, for validation.
        val_images: as `train_images`, for validation.
        test_annotations: as `train_annotations`, for testing. None means no test split.
        test_images: as `train_images`, for testing.
        classes: names of the categories to train on and to evaluate; annotations of others are left out. None takes all
            categories. The labels are in the order of the category ids.
        common: arguments of `DetectionData`.

    Raises:
        ValueError: if `classes` is a single name instead of a list.
    """

    def __init__(
        self,
        *,
        train_annotations: str | None = None,
        train_images: str | None = None,
        val_annotations: str | None = None,
        val_images: str | None = None,
        test_annotations: str | None = None,
        test_images: str | None = None,
        classes: Sequence[str] | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        self.classes = check_classes(classes)
        self.annotation_files = {"train": train_annotations, "val": val_annotations, "test": test_annotations}
        self.image_folders = {"train": train_images, "val": val_images, "test": test_images}

    @property
    def splits(self) -> Sequence[str]:
        return SPLITS if self.annotation_files["test"] else SPLITS[:2]

    def read(self, split: str) -> tuple[CocoIndex, Path]:
        annotations = self._path(f"{split}_annotations", self.annotation_files[split])
        folder = self._path(f"{split}_images", self.image_folders[split])
        if not annotations.is_file():
            raise ValueError(f"data.{split}_annotations: there is no file {annotations}")
        if not folder.is_dir():
            raise ValueError(f"data.{split}_images: there is no folder {folder}")
        return read_coco(annotations, self.classes), folder

    def _path(self, key: str, value: str | None) -> Path:
        assert self.root is not None
        if value is None:
            raise ValueError(f"data.{key} is needed")
        return self.root / Path(value).expanduser()


class PIDray(Coco):
    """Prohibited items in X-ray images (arXiv:2108.07020), in the layout of the authors' archive.

    The annotations are `root`/annotations/xray_{train,test_easy,test_hard,test_hidden}.json and the images are in
    `root`/{train,easy,hard,hidden}. There is no validation set: as in the authors' repository, validation uses the
    images of the test.

    Args:
        test: test set: easy (one prohibited item per image), hard (several items) or hidden (deliberately concealed
            items).
        common: arguments of `DetectionData`.

    Raises:
        ValueError: if there is no such test set.
    """

    def __init__(self, *, test: str = "easy", **common: Any):
        if test not in ("easy", "hard", "hidden"):
            raise ValueError(f"data.test must be easy, hard or hidden, not {test!r}")
        super().__init__(
            train_annotations="annotations/xray_train.json",
            train_images="train",
            val_annotations=f"annotations/xray_test_{test}.json",
            val_images=test,
            **common,
        )
