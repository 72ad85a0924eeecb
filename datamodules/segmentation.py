"""Images with a class for each pixel: the data module of every segmentation set, and the set of files it loads."""

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from datamodules.batch import normalise
from datamodules.decode import BrokenImage
from datamodules.dense import DenseData
from datamodules.dense_transforms import Size, normalise_padded, pad_images
from datamodules.images import EXTENSIONS, EncodedImages, list_images
from retinue.utils.masks import IGNORED


class MaskedImages(EncodedImages):
    """Image files with their masks.

    `self[i]` is {"image": uint8 (H, W, 3), "mask": uint8 (H, W)}; the mask's values are labels 0..K-1, or 255 where it
    is ignored.

    Args:
        images, masks: the folders that the names are relative to.
        pairs: names of an image and of its mask.
        values: a mask file's value → label; 255 is ignored in every set.

    Raises:
        ValueError: when a sample is read: its mask has another size than the image, more than one channel, or a value
            that is none of `values`.
    """

    def __init__(self, images: Path, masks: Path, pairs: Sequence[tuple[str, str]], values: Mapping[int, int]):
        self.folders = os.fspath(images), os.fspath(masks)
        # Bytes in one array: workers share its memory.
        self.files = np.array([[os.fsencode(name) for name in pair] for pair in pairs])
        self.labels = np.full(257, -1, np.int16)  # by value; the last one stands for all above 255
        self.labels[IGNORED] = IGNORED
        for value, label in values.items():
            self.labels[value] = label

    @property
    def blank(self) -> dict:
        """A sample that stands for padding."""
        return {"image": np.zeros((32, 32, 3), np.uint8), "mask": np.full((32, 32), IGNORED, np.uint8)}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        image, mask = self.image(index), self.mask(index)
        if mask.shape != image.shape[:2]:
            (height, width), (h, w) = mask.shape, image.shape[:2]
            raise ValueError(f"{self._path(index, 1)} is {width} x {height} px, but its image is {w} x {h}")
        return {"image": image, "mask": mask}

    def mask(self, index: int) -> np.ndarray:
        """uint8 (H, W), labels."""
        path = self._path(index, 1)
        try:
            with Image.open(path) as image:
                values, mode = np.array(image), image.mode
        except Exception as error:  # each of Pillow's decoders has its own
            raise BrokenImage(f"its mask {path}: {error}") from error
        if values.ndim != 2:
            raise ValueError(f"{path} is {mode}: a mask has one value a pixel, its class (grey or with a palette)")
        mask = np.take(self.labels, values, mode="clip")
        if mask.min() < 0:
            classes = len(set(self.labels.tolist()) - {-1, IGNORED})
            value = values[mask < 0][0]
            raise ValueError(f"{path} has the value {value}: none of the {classes} classes, and not ignored")
        return mask.astype(np.uint8)

    def read(self, index: int) -> bytes:
        with open(self._path(index, 0), "rb") as file:
            return file.read()

    def name(self, index: int) -> str:
        return os.fsdecode(self.files[index, 0].item())

    def _path(self, index: int, which: int) -> str:
        return os.path.join(self.folders[which], os.fsdecode(self.files[index, which].item()))


def pair_files(images: Path, masks: Path, image_end: str = "", mask_end: str = "") -> list[tuple[str, str]]:
    """Names of the images below a folder and of their masks (PNG) below another, sorted.

    A pair's paths are equal but for suffix and ends: with "_image" and "_mask", a/1_image.jpg and a/1_mask.png are one.

    Raises:
        ValueError: there are no images, or an image without its mask, or a mask without its image.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
    found = _by_stem(images, EXTENSIONS, image_end)
    truth = _by_stem(masks, (".png",), mask_end)
    if not found:
        raise ValueError(f"no images in {images} (looked for {', '.join(EXTENSIONS)})")
    for what, here, there, folder in (
        ("image without its mask", found, truth, masks),
        ("mask without its image", truth, found, images),
    ):
        if alone := sorted(here.keys() - there.keys()):
            raise ValueError(f"{here[alone[0]]}: {what} in {folder} ({len(alone)} of {len(here)} are so)")
    return [(found[stem], truth[stem]) for stem in sorted(found)]


def _by_stem(folder: Path, suffixes: tuple[str, ...], end: str) -> dict[str, str]:
    """The files below `folder` that have one of the suffixes, by their path without suffix and `end`."""
    files: dict[str, str] = {}
    for name in list_images(folder):
        stem, suffix = os.path.splitext(name)
        if not (suffix.lower() in suffixes and stem.endswith(end)):
            continue
        stem = stem.removesuffix(end)
        if stem in files:
            raise ValueError(f"{files[stem]} and {name} in {folder} have one name: which one the mask is of is unclear")
        files[stem] = name
    return files


class SegmentationData(DenseData):
    """Images with a class for each pixel.

    A training batch has `image` (float32 (B, 3, H, W), normalised and then padded with zeros once it is on the device)
    and `mask` (int64 (B, H, W), labels 0..K-1, 255 where ignored or padded). An evaluation batch has lists, as sizes
    differ: `image`, of float32 (3, h, w), and `mask`, of int64 (H, W) at the size of its file; and `original_sizes`
    (B, 2), those sizes.

    Args:
        common: arguments of `DenseData`.
    """

    def __init__(self, **common: Any):
        super().__init__(**common)
        self.collate = partial(collate, crop=self.augment.crop)

    @abstractmethod
    def load(self, split: str) -> MaskedImages: ...

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        if "sizes" in batch:
            image = normalise_padded(batch["image"], batch.pop("sizes"), self.mean, self.std)
            return batch | {"image": image, "mask": batch["mask"].long()}
        device = batch["index"].device
        mean, std = torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)
        images = [normalise(image[None], mean, std)[0] for image in batch["image"]]
        return batch | {"image": images, "mask": [mask.long() for mask in batch["mask"]]}


def collate(samples: Sequence[dict], crop: Size | None = None) -> dict:
    """Samples of any sizes to one batch of bytes, as `SegmentationData` says.

    Training samples are padded to the crop, or, without one, to the largest of them, rounded up to a multiple of 32;
    `sizes` (B, 2) are theirs without the padding.
    """
    index = torch.tensor([int(sample["index"]) for sample in samples])
    images, masks = [sample["image"] for sample in samples], [sample["mask"] for sample in samples]
    if "original_size" in samples[0]:
        batch = {
            "image": [torch.from_numpy(image).permute(2, 0, 1) for image in images],  # (h, w, 3) → (3, h, w)
            "mask": [torch.from_numpy(mask) for mask in masks],
            "original_sizes": torch.tensor(np.stack([sample["original_size"] for sample in samples])),
        }
        return batch | {"index": index}
    height, width = crop or (-(-max(sides) // 32) * 32 for sides in zip(*(mask.shape for mask in masks), strict=True))
    image, sizes = pad_images(images, (height, width))
    padded = torch.full((len(masks), height, width), IGNORED, dtype=torch.uint8)
    for place, mask in zip(padded, masks, strict=True):
        place[: mask.shape[0], : mask.shape[1]] = torch.from_numpy(mask)
    return {"image": image, "mask": padded, "sizes": sizes, "index": index}
