"""Images with a label for each pixel: base class of every segmentation data set, and the image files it loads."""

import io
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from datamodules.batch import channel_values, normalise
from datamodules.decode import BrokenImage, check_pixels, read_file
from datamodules.dense_prediction import DensePredictionData
from datamodules.dense_transforms import Size, normalise_padded, pad_images
from datamodules.images import EXTENSIONS, EncodedImages, list_images
from retinue.utils.arithmetic import round_up
from retinue.utils.masks import IGNORED

# Columns of `MaskedImages.files`, and positions in `MaskedImages.folders`.
IMAGE, MASK = 0, 1
# Without a crop, a training batch's height and width are multiples of this number of pixels.
SIZE_DIVISOR = 32


class MaskedImages(EncodedImages):
    """Set of image files with their masks.

    The sample `self[i]` is {"image": uint8 (H, W, 3), "mask": uint8 (H, W)}; the values of the mask are the labels 0
    to K - 1, or 255 for ignored pixels.

    Args:
        images: folder that the images' names are relative to.
        masks: folder that the masks' names are relative to.
        pairs: names of each image and of its mask.
        values: label of each value that a mask file may have; the value 255 is ignored unless it has a label here.

    Raises:
        ValueError: if a mask has another size than its image, more than one channel, or a value that `values` lacks;
            raised when the sample is read.
    """

    def __init__(self, images: Path, masks: Path, pairs: Sequence[tuple[str, str]], values: Mapping[int, int]):
        self.folders = os.fspath(images), os.fspath(masks)
        # The names are bytes in one array, so that loading processes share their memory.
        self.files = np.array([[os.fsencode(name) for name in pair] for pair in pairs])
        # Label of each mask value, -1 for an invalid value; the last entry stands for all values above 255.
        self.labels = np.full(257, -1, np.int16)
        self.labels[IGNORED] = IGNORED
        for value, label in values.items():
            self.labels[value] = label

    @property
    def mask_values(self) -> np.ndarray:
        """Value of each label in a mask file, uint8 (K,)."""
        labels = self.labels[:256].tolist()
        return np.array([labels.index(label) for label in sorted(set(labels) - {-1, IGNORED})], np.uint8)

    @property
    def blank(self) -> dict:
        """Sample that stands for padding: all of its pixels are ignored."""
        return {"image": np.zeros((32, 32, 3), np.uint8), "mask": np.full((32, 32), IGNORED, np.uint8)}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        image, mask = self.image(index), self.mask(index)
        if mask.shape != image.shape[:2]:
            (height, width), (h, w) = mask.shape, image.shape[:2]
            raise ValueError(f"{self._path(index, MASK)} is {width} x {height} px, but its image is {w} x {h}")
        return {"image": image, "mask": mask}

    def mask(self, index: int) -> np.ndarray:
        """Return the mask at a position: uint8 (H, W), labels."""
        path = self._path(index, MASK)
        try:
            with Image.open(io.BytesIO(read_file(path))) as image:
                check_pixels(*image.size)
                values, mode = np.array(image), image.mode
        except Exception as error:
            # Pillow's decoders raise errors of many types.
            raise BrokenImage(f"its mask {path}: {error}") from error
        if values.ndim != 2:
            raise ValueError(
                f"{path} is {mode}: a mask must have one value per pixel, its class (grey or with a palette)"
            )
        mask = np.take(self.labels, values, mode="clip")
        if mask.min() < 0:
            classes = len(set(self.labels.tolist()) - {-1, IGNORED})
            value = values[mask < 0][0]
            raise ValueError(f"{path} has the value {value}: none of the {classes} classes, and not ignored")
        return mask.astype(np.uint8)

    def read(self, index: int) -> bytes:
        return read_file(self._path(index, IMAGE))

    def name(self, index: int) -> str:
        return os.fsdecode(self.files[index, IMAGE].item())

    def _path(self, index: int, column: int) -> str:
        return os.path.join(self.folders[column], os.fsdecode(self.files[index, column].item()))


def pair_files(images: Path, masks: Path, image_end: str = "", mask_end: str = "") -> list[tuple[str, str]]:
    """Return the names of all images below one folder and of their masks (PNG) below another folder, sorted.

    The paths of an image and its mask may differ in their suffixes and in the given endings of their names only.

    Args:
        images: folder of the images.
        masks: folder of the masks.
        image_end: ending of an image's name before its suffix; other images are skipped.
        mask_end: ending of a mask's name before its suffix; other masks are skipped.

    Raises:
        ValueError: if there are no images, an image has no mask, or a mask has no image.

    Example:
        With the endings "_image" and "_mask", a/1_image.jpg and a/1_mask.png are a pair.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
    image_files = _files_by_stem(images, EXTENSIONS, image_end)
    mask_files = _files_by_stem(masks, (".png",), mask_end)
    if not image_files:
        raise ValueError(f"no images in {images} (looked for {', '.join(EXTENSIONS)})")
    for problem, files, partners, partner_folder, endings in (
        ("image without its mask", image_files, mask_files, masks, f"{mask_end}.png"),
        ("mask without its image", mask_files, image_files, images, f"{image_end}{{{','.join(EXTENSIONS)}}}"),
    ):
        if unpaired := sorted(files.keys() - partners.keys()):
            count = f"{len(unpaired)} of {len(files)} lack one"
            looked_for = f"looked for {unpaired[0]}{endings}"
            raise ValueError(f"{files[unpaired[0]]}: {problem} in {partner_folder} ({looked_for}; {count})")
    return [(image_files[stem], mask_files[stem]) for stem in sorted(image_files)]


def _files_by_stem(folder: Path, suffixes: tuple[str, ...], end: str) -> dict[str, str]:
    """Return the files below `folder` with one of the suffixes, by their path without suffix and `end`."""
    files: dict[str, str] = {}
    for name in list_images(folder):
        stem, suffix = os.path.splitext(name)
        if not (suffix.lower() in suffixes and stem.endswith(end)):
            continue
        stem = stem.removesuffix(end)
        if stem in files:
            raise ValueError(f"{files[stem]} and {name} in {folder} have the same name, so their pair is ambiguous")
        files[stem] = name
    return files


class SegmentationData(DensePredictionData):
    """Images with a label for each pixel.

    The module docstring of `datamodules.batch` specifies the batches.

    Args:
        common: arguments of `DensePredictionData`.

    Attributes:
        background: label of the background, which is no object. None if all classes are objects.
    """

    background: int | None = None

    def __init__(self, **common: Any):
        super().__init__(**common)
        self.collate = partial(collate, crop=self.augment.crop)

    @property
    def class_ids(self) -> list[int]:
        return self.images("val").mask_values.tolist()

    @abstractmethod
    def load(self, split: str) -> MaskedImages: ...

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        if "sizes" in batch:
            image = normalise_padded(batch["image"], batch.pop("sizes"), self.mean, self.std)
            return batch | {"image": image, "mask": batch["mask"].long()}
        device = batch["index"].device
        mean, std = channel_values(self.mean, device), channel_values(self.std, device)
        images = [normalise(image[None], mean, std)[0] for image in batch["image"]]
        return batch | {"image": images, "mask": [mask.long() for mask in batch["mask"]]}


def collate(samples: Sequence[dict], crop: Size | None = None) -> dict:
    """Join samples of any sizes to one batch of bytes.

    Args:
        samples: transformed samples of training or of evaluation.
        crop: (height, width) to which training samples are padded. None pads them to the largest height and width of
            the samples, rounded up to multiples of 32.

    Returns:
        The batch of `datamodules.batch` before normalising: images and masks are uint8. A training batch also has
        `sizes`, int64 (B, 2), height and width of each image without its padding.
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
    if crop is None:
        height, width = (round_up(max(mask.shape[axis] for mask in masks), SIZE_DIVISOR) for axis in (0, 1))
    else:
        height, width = crop
    image, sizes = pad_images(images, (height, width))
    padded_masks = torch.full((len(masks), height, width), IGNORED, dtype=torch.uint8)
    for padded, mask in zip(padded_masks, masks, strict=True):
        padded[: mask.shape[0], : mask.shape[1]] = torch.from_numpy(mask)
    return {"image": image, "mask": padded_masks, "sizes": sizes, "index": index}
