"""Labelled images, by position: what the classification data modules load."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datamodules.decode import BrokenImage, decode

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class LabelledImages(ABC):
    """`self[i]` is {"image": uint8 (H, W, 3), "label": int64}; it raises `BrokenImage` where there is none to see."""

    labels: np.ndarray  # (N,) int64

    @property
    def blank(self) -> dict:
        """A sample that stands for padding."""
        return {"image": np.zeros((32, 32, 3), np.uint8), "label": np.int64(0)}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.image(index), "label": self.labels[index]}

    @abstractmethod
    def image(self, index: int) -> np.ndarray: ...

    @abstractmethod
    def name(self, index: int) -> str: ...


class ArrayImages(LabelledImages):
    """Images in memory.

    Args:
        images: uint8 (N, H, W) or (N, H, W, 3).
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, name: str):
        self.images, self.labels, self.split = images, labels.astype(np.int64), name

    def image(self, index: int) -> np.ndarray:
        image = self.images[index]
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)

    def name(self, index: int) -> str:
        return f"{self.split}/{index:05d}"


class EncodedImages(LabelledImages):
    """Images as files' contents, decoded when asked for."""

    @abstractmethod
    def read(self, index: int) -> bytes: ...

    def image(self, index: int) -> np.ndarray:
        try:
            return decode(self.read(index))
        except OSError as error:
            raise BrokenImage(error.strerror or str(error)) from error


class FileImages(EncodedImages):
    """Image files.

    Args:
        root: folder that the names are relative to.
        files: their names; the position in it is the image's.
        labels: one of each.
    """

    def __init__(self, root: Path, files: Sequence[str], labels: Sequence[int]):
        self.root = os.fspath(root)
        self.files = np.array([os.fsencode(file) for file in files])  # bytes in one array: workers share its memory
        self.labels = np.array(labels, np.int64)

    def read(self, index: int) -> bytes:
        with open(os.path.join(self.root, self.name(index)), "rb") as file:
            return file.read()

    def name(self, index: int) -> str:
        return os.fsdecode(self.files[index].item())


def list_images(folder: Path) -> list[str]:
    """Names of the image files anywhere below `folder`, relative to it, sorted."""
    found = []
    for directory, _, files in os.walk(folder, followlinks=True):
        inside = os.path.relpath(directory, folder)
        found += [os.path.normpath(os.path.join(inside, f)) for f in files if f.lower().endswith(EXTENSIONS)]
    return sorted(found)


def list_classes(folder: Path) -> list[str]:
    """Names of the class folders in `folder`, sorted.

    Raises:
        ValueError: there are none.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"no class folders in {folder}: expected one folder of images a class")
    return names


def class_folders(root: Path, folder: str, classes: Sequence[str], labels: Sequence[int] | None = None) -> FileImages:
    """The images of `root`/`folder`/<class>/, named relative to `root`/`folder`.

    Args:
        labels: label of each class; its position by default.

    Raises:
        ValueError: there is no image at all.
    """
    files, numbers = [], []
    for label, name in zip(labels if labels is not None else range(len(classes)), classes, strict=True):
        inside = [os.path.join(name, file) for file in list_images(root / folder / name)]
        files += inside
        numbers += [label] * len(inside)
    if not files:
        raise ValueError(f"no images in the class folders of {root / folder} (looked for {', '.join(EXTENSIONS)})")
    return FileImages(root / folder, files, numbers)


def rank_in_class(labels: np.ndarray) -> np.ndarray:
    """(N,) how many images of the same class come before each: what fixed stratified splits are made of."""
    order = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[order], labels[order])  # where the class begins in that order
    rank = np.empty_like(order)
    rank[order] = np.arange(len(labels)) - first
    return rank
