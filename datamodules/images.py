"""Sets of labelled images, read by position, for the classification data modules."""

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datamodules.decode import BrokenImage, EncodedJPEG, decode, read_file

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class LabelledImages(ABC):
    """Set of images with one label each.

    The sample `self[i]` is {"image": uint8 (H, W, 3), "label": int64}; reading it raises `BrokenImage` if the image
    cannot be decoded.

    Attributes:
        labels: (N,) int64, the label of each image.
    """

    labels: np.ndarray

    @property
    def blank(self) -> dict:
        """Sample that stands for padding."""
        return {"image": np.zeros((32, 32, 3), np.uint8), "label": np.zeros(self.labels.shape[1:], np.int64)}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.image(index), "label": self.labels[index]}

    @abstractmethod
    def image(self, index: int) -> np.ndarray:
        """Return the image at a position, uint8 (H, W, 3), or raise `BrokenImage`."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of the image at a position."""

    def encoded(self) -> "LabelledImages":
        """Return the set with JPEGs as `EncodedJPEG` in its samples, which their transform decodes, if it has any."""
        return self


class ArrayImages(LabelledImages):
    """Set of images in memory.

    Args:
        images: uint8 (N, H, W) or (N, H, W, 3).
        labels: (N,), the label of each image.
        name: prefix of the images' names, such as "digits/train".
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, name: str):
        self.images, self.labels, self.prefix = images, labels.astype(np.int64), name

    def image(self, index: int) -> np.ndarray:
        image = self.images[index]
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)

    def name(self, index: int) -> str:
        return f"{self.prefix}/{index:05d}"


class EncodedImages(LabelledImages):
    """Set of encoded images, which are decoded when they are read.

    Attributes:
        undecoded: whether samples hold JPEGs as `EncodedJPEG`, which their transform decodes.
    """

    undecoded = False

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return the encoded image at a position."""

    def encoded(self) -> "LabelledImages":
        images = copy.copy(self)
        images.undecoded = True
        return images

    def stem(self, index: int) -> str:
        """Return the name of the image at a position without its suffix, for files that belong to the image."""
        return os.path.splitext(self.name(index))[0]

    def __getitem__(self, index: int) -> dict:
        if not self.undecoded:
            return super().__getitem__(index)
        try:
            return {"image": EncodedJPEG(self._read(index)), "label": self.labels[index]}
        except ValueError:
            return super().__getitem__(index)

    def image(self, index: int) -> np.ndarray:
        return decode(self._read(index))

    def _read(self, index: int) -> bytes:
        try:
            return self.read(index)
        except OSError as error:
            raise BrokenImage(error.strerror or str(error)) from error


class FileImages(EncodedImages):
    """Set of image files.

    Args:
        root: folder that the file names are relative to.
        files: names of the files, by position.
        labels: label of each file.
    """

    def __init__(self, root: Path, files: Sequence[str], labels: Sequence[int]):
        self.root = os.fspath(root)
        # The names are bytes in one array, so that loading processes share their memory.
        self.files = np.array([os.fsencode(file) for file in files])
        self.labels = np.array(labels, np.int64)

    def read(self, index: int) -> bytes:
        return read_file(os.path.join(self.root, self.name(index)))

    def name(self, index: int) -> str:
        return os.fsdecode(self.files[index].item())


class Subset(LabelledImages):
    """Some images of another set.

    Args:
        images: the other set.
        positions: (N,) positions of the images in it.
    """

    def __init__(self, images: LabelledImages, positions: np.ndarray):
        self.source, self.positions, self.labels = images, positions, images.labels[positions]

    @property
    def blank(self) -> dict:
        return self.source.blank

    def __getitem__(self, index: int) -> dict:
        return self.source[int(self.positions[index])]

    def encoded(self) -> LabelledImages:
        return Subset(self.source.encoded(), self.positions)

    def image(self, index: int) -> np.ndarray:
        return self.source.image(int(self.positions[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.positions[index]))


def list_images(folder: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Return the names of all files below `folder` with one of the extensions, relative to it and sorted."""
    names = []
    for directory, _, files in os.walk(folder, followlinks=True):
        prefix = os.path.relpath(directory, folder)
        names += [os.path.normpath(os.path.join(prefix, f)) for f in files if f.lower().endswith(extensions)]
    return sorted(names)


def list_classes(folder: Path) -> list[str]:
    """Return the names of the class folders in `folder`, sorted.

    Raises:
        ValueError: if there is no class folder.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"no class folders in {folder}: expected one folder of images a class")
    return names


def read_class_folders(
    root: Path,
    folder: str,
    classes: Sequence[str],
    labels: Sequence[int] | None = None,
    extensions: tuple[str, ...] = EXTENSIONS,
) -> FileImages:
    """Return the images of `root`/`folder`/<class>/, named relative to `root`/`folder`.

    Args:
        root: folder of the data set.
        folder: folder in `root` that has the class folders.
        classes: names of the class folders.
        labels: label of each class; by default its position in `classes`.
        extensions: endings of the names of image files.

    Raises:
        ValueError: if there is no image.
    """
    files, file_labels = [], []
    for label, name in zip(labels if labels is not None else range(len(classes)), classes, strict=True):
        class_files = [os.path.join(name, file) for file in list_images(root / folder / name, extensions)]
        files += class_files
        file_labels += [label] * len(class_files)
    if not files:
        raise ValueError(f"no images in the class folders of {root / folder} (looked for {', '.join(extensions)})")
    return FileImages(root / folder, files, file_labels)


def index_in_class(labels: np.ndarray) -> np.ndarray:
    """Return (N,) the number of preceding images of the same class; fixed stratified splits are made from it."""
    order = np.argsort(labels, kind="stable")
    # Entry of `order` at which the class of each entry begins.
    first = np.searchsorted(labels[order], labels[order])
    counts = np.empty_like(order)
    counts[order] = np.arange(len(labels)) - first
    return counts


def draw_shots(labels: np.ndarray, is_object: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Draw objects or images of each class; the draw of fewer shots with the same seed is a part of it.

    Args:
        labels: (A,) class of each annotation or image.
        is_object: bool (A,), which of them may be drawn.
        shots: number for each class; a class with fewer keeps all of them.
        seed: seed of the draw.

    Returns:
        bool (A,), which of them were drawn.
    """
    drawn = np.zeros(len(labels), bool)
    for label in np.unique(labels[is_object]).tolist():
        objects = np.flatnonzero(is_object & (labels == label))
        drawn[np.random.default_rng([seed, label]).permutation(objects)[:shots]] = True
    return drawn
