"""Any folder of images for pretraining, with or without class folders."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from datamodules.bands import EXTENSIONS as BAND_EXTENSIONS
from datamodules.bands import BandImages
from datamodules.holdout import part_of_split
from datamodules.image_folder import ImageFolder
from datamodules.images import EXTENSIONS, FileImages, list_images
from datamodules.scenes import find_scenes


class AnyFolder(ImageFolder):
    """All images below `root`, at any depth; with folders `train`, `val` and `test` in it, these are the splits.

    The images have labels if those of each split lie in class folders, as in `ImageFolder`. Otherwise all labels are
    -1, and without a `val` folder every fifth image is for validation.
    """

    @property
    def extensions(self) -> tuple[str, ...]:
        """Endings of the names of image files."""
        return BAND_EXTENSIONS if self.has_bands else EXTENSIONS

    @cached_property
    def class_names(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        try:
            classes = ImageFolder.class_names.func(self)
        except ValueError:
            return ()
        folders = [self._folder(split) for split in self._split_folders] or [self._folder("train")]
        beside = [file for folder in folders for file in folder.iterdir() if file.suffix.lower() in self.extensions]
        return () if beside else classes

    @property
    def splits(self) -> Sequence[str]:
        return super().splits if self.class_names else ("train", "val", *({"test"} & set(self._split_folders)))

    def load(self, split: str) -> FileImages:
        if self.class_names:
            return super().load(split)
        own = split in self._split_folders
        folder = self._folder(split if own else "train")
        names = np.array(list_images(folder, self.extensions))
        if not names.size:
            raise ValueError(f"no images in {folder} (looked for {', '.join(self.extensions)})")
        if "val" not in self._split_folders and split != "test":
            names = names[part_of_split(np.arange(len(names)), split)]
        images = FileImages(folder, names.tolist(), [-1] * len(names))
        return BandImages(images, self.in_chans) if self.has_bands else images

    def check(self, images: FileImages, split: str) -> None:
        if self.class_names:
            super().check(images, split)

    def _folder(self, split: str) -> Path:
        assert self.root is not None
        return self.root / split if split in self._split_folders else self.root


class ScenesImages(AnyFolder):
    """Images of the scenes (`datamodules.scenes`) without their labels; without a root, in the user's cache."""

    def find_root(self, root: str | None) -> Path | None:
        folder = super().find_root(str(find_scenes()) if root is None else root)
        return None if folder is None else folder / "images"
