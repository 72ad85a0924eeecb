"""COCO (arXiv:1405.0312), PIDray, and any other set in COCO's format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.base import SPLITS
from datamodules.coco_format import CocoIndex, read_coco
from datamodules.detection import DetectionData


class Coco(DetectionData):
    """Images in folders, and one JSON file of annotations a split; masks are used where every annotation has one.

    Without annotations for testing the test split is the validation split.

    Args:
        train_annotations, val_annotations, test_annotations: JSON files, relative to `root`.
        train_images, val_images, test_images: folders that the files' `file_name`s are relative to; relative to `root`.
        common: arguments of `DetectionData`.
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
        **common: Any,
    ):
        super().__init__(**common)
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
        return read_coco(annotations), folder

    def _path(self, key: str, value: str | None) -> Path:
        assert self.root is not None
        if value is None:
            raise ValueError(f"data.{key} is needed")
        return self.root / Path(value).expanduser()


class PIDray(Coco):
    """Prohibited items in X-ray images (arXiv:2108.07020), as the authors' archive unpacks: `root`/annotations/
    xray_{train,test_easy,test_hard,test_hidden}.json and the images in `root`/{train,easy,hard,hidden}.

    There is no validation set: as in the authors' repository, it is validated on the images that it is tested on.

    Args:
        test: easy (one prohibited item an image), hard (several) or hidden (deliberately concealed).
        common: arguments of `DetectionData`.
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
