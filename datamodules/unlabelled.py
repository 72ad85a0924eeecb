"""Images without labels, prepared exactly as the test images of the data that a net was trained for."""

import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.bands import EXTENSIONS as BAND_EXTENSIONS
from datamodules.bands import BandImages
from datamodules.base import ClassificationData, ImageData
from datamodules.classes import Classes
from datamodules.detection import SIZE_DIVISOR, DetectionData
from datamodules.images import EXTENSIONS, FileImages, list_images
from datamodules.loader import Loader
from datamodules.segmentation import SegmentationData
from datamodules.transforms import PILLOW_MODES
from retinue.utils.masks import IGNORED
from retinue.utils.suggestions import nearest


def find_images(images: str, extensions: tuple[str, ...] = EXTENSIONS) -> tuple[Path, list[str]]:
    """Return a folder, and the sorted names of image files relative to it.

    Args:
        images: a folder, whose subfolders count too; a pattern such as `photos/**/*.jpg`, where `**` stands for any
            folders; or one file.
        extensions: endings of the names of image files; one file may have any name.

    Raises:
        ValueError: if there is no such file or folder, or it holds no image.
    """
    path = Path(images).expanduser()
    if path.is_dir():
        folder, names = path, list_images(path, extensions)
    elif path.exists():
        return path.parent, [path.name]
    elif glob.has_magic(str(path)):
        folder = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = (Path(match) for match in glob.iglob(str(path), recursive=True))
        names = sorted(
            os.path.relpath(match, folder)
            for match in found
            if match.suffix.lower() in extensions and not match.is_dir()
        )
    else:
        beside = os.listdir(path.parent) if path.parent.is_dir() else []
        raise ValueError(f"images={images}: there is no such file or folder.{nearest(path.name, beside)}")
    if not names:
        raise ValueError(f"images={images}: there are no images (looked for {', '.join(extensions)})")
    return folder, names


class UnlabelledFiles(FileImages):
    """Set of image files whose names may differ in their suffix only.

    Args:
        root: folder that the file names are relative to.
        files: names of the files, by position.
        label: label that stands in the samples for the unknown one.
    """

    def __init__(self, root: Path, files: Sequence[str], label: int = 0):
        super().__init__(root, files, [label] * len(files))
        stems = Counter(os.path.splitext(file)[0] for file in files)
        self._shared = {stem for stem, count in stems.items() if count > 1}

    def stem(self, index: int) -> str:
        stem = super().stem(index)
        return self.name(index) if stem in self._shared else stem


class DetectionFiles(UnlabelledFiles):
    """Image files for a detector; the sample `self[i]` is {"image": uint8 (H, W, 3)}."""

    @property
    def ids(self) -> np.ndarray:
        """Image ids (N,), by position, from 1."""
        return np.arange(1, len(self) + 1)

    @property
    def blank(self) -> dict:
        return {"image": np.zeros((SIZE_DIVISOR, SIZE_DIVISOR, 3), np.uint8)}

    def __getitem__(self, index: int) -> dict:
        return {"image": self.image(index)}


class SegmentationFiles(UnlabelledFiles):
    """Image files for a segmentor; in the sample `self[i]` all pixels of the mask are ignored.

    Args:
        root: folder that the file names are relative to.
        files: names of the files, by position.
        mask_values: value of each label in a mask file, (K,).
    """

    def __init__(self, root: Path, files: Sequence[str], mask_values: Sequence[int]):
        super().__init__(root, files)
        self.mask_values = np.array(mask_values, np.uint8)

    @property
    def blank(self) -> dict:
        return _without_mask(np.zeros((SIZE_DIVISOR, SIZE_DIVISOR, 3), np.uint8))

    def __getitem__(self, index: int) -> dict:
        return _without_mask(self.image(index))


def _without_mask(image: np.ndarray) -> dict:
    return {"image": image, "mask": np.full(image.shape[:2], IGNORED, np.uint8)}


class Batches:
    """The batches of a loader, without the loader's class, which Lightning would make anew with a sampler of its own.

    Args:
        loader: the loader.
    """

    def __init__(self, loader: Loader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict]:
        return iter(self.loader)


class UnlabelledData(ImageData):
    """Base class of images without labels, which are the only split, `test`. All of them may be broken.

    Args:
        images: as in `find_images`.
        classes: classes that the net predicts.
        common: arguments of the task's base class.
    """

    extensions = EXTENSIONS

    def __init__(self, *, images: str, classes: Classes, **common: Any):
        super().__init__(**common, broken_limit=1.0)
        self._classes = classes
        self.folder, self.names_of_files = find_images(images, self.extensions)

    def find_root(self, root: str | None) -> None:
        return None

    @property
    def class_names(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._classes.names

    @property
    def class_ids(self) -> list[int]:
        return list(self._classes.ids)

    @property
    def splits(self) -> Sequence[str]:
        return ("test",)

    def images(self, split: str) -> Any:
        return self._files

    @cached_property
    def _files(self) -> Any:
        return self.load("test")

    def predict_dataloader(self) -> "Batches":
        return Batches(self.test_dataloader())


class UnlabelledClassification(UnlabelledData, ClassificationData):
    """Images for a classifier.

    Args:
        bands: as in `datamodules.image_folder.ImageFolder`.
        in_chans: number of channels or bands.
        common: arguments of `UnlabelledData` and of `ClassificationData`.
    """

    def __init__(self, *, bands: bool | None = None, in_chans: int = 3, **common: Any):
        self.has_bands = in_chans not in PILLOW_MODES if bands is None else bands
        self.extensions = BAND_EXTENSIONS if self.has_bands else EXTENSIONS
        super().__init__(in_chans=in_chans, **common)

    @property
    def class_subset(self) -> list[int] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        subset = self._classes.subset
        return None if subset is None else list(subset)

    def load(self, split: str) -> FileImages:
        # Images of other labels than those of the subset would be left out.
        label = self.class_subset[0] if self.class_subset else 0
        files = UnlabelledFiles(self.folder, self.names_of_files, label)
        return BandImages(files, self.in_chans) if self.has_bands else files


class UnlabelledMultiLabel(UnlabelledClassification):
    """Images for a multi-label classifier."""

    def load(self, split: str) -> FileImages:
        files = super().load(split)
        files.labels = np.zeros((len(files), self.num_classes), np.int64)
        return files


class UnlabelledDetection(UnlabelledData, DetectionData):
    """Images for a detector, which may predict masks."""

    has_masks = True  # pyright: ignore[reportAssignmentType]

    @property
    def category_ids(self) -> list[int]:
        return self.class_ids

    def read(self, split: str) -> Any:
        raise NotImplementedError("images without labels have no annotations")

    def load(self, split: str) -> Any:
        return DetectionFiles(self.folder, self.names_of_files)


class UnlabelledPanoptic(UnlabelledDetection):
    """Images for a panoptic segmentor."""

    @property
    def num_things(self) -> int:
        """Number of the classes that are things; they come first.

        Raises:
            ValueError: if the run, of an earlier version, has not kept the number.
        """
        if self._classes.num_things is None:
            raise ValueError("the run's classes.json does not say how many classes are things: train the run anew")
        return self._classes.num_things


class UnlabelledSegmentation(UnlabelledData, SegmentationData):
    """Images for a segmentor."""

    def load(self, split: str) -> Any:
        return SegmentationFiles(self.folder, self.names_of_files, self.class_ids)


# Class of images without labels by the name of the task.
UNLABELLED: dict[str, type[UnlabelledData]] = {
    "classification": UnlabelledClassification,
    "multi_label": UnlabelledMultiLabel,
    "hashing": UnlabelledClassification,
    "detection": UnlabelledDetection,
    "segmentation": UnlabelledSegmentation,
    "panoptic": UnlabelledPanoptic,
}
