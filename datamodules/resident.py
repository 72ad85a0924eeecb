"""Data sets that are kept in the memory of the device that trains, where their batches are made.

For few small images, sending batches to a GPU and waiting for loading processes takes longer than the steps. Here the
loading processes send the positions of the images and what was drawn for each of them; the pixels of the batches are
those that they would be on the CPU.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datamodules.images import ArrayImages
from datamodules.transforms import EvalTransform, TrainTransform, resize

# Largest size in bytes of the images of a split that are kept on the device.
MAX_BYTES = 2**30


class Labels:
    """The labels of a set of images, as a data set without images; `blank` is padding."""

    def __init__(self, images: ArrayImages):
        self.labels, self.name = images.labels, images.name
        self.blank = {"label": np.int64(0)}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"label": self.labels[index]}


@dataclass(frozen=True)
class DrawSquare:
    """Transform of a training sample without an image: draw the square that is taken from an image of size `size`."""

    transform: TrainTransform
    size: tuple[int, int]

    def __call__(self, sample: dict) -> dict:
        return sample | self.transform.draw_square(self.size)


class Residents:
    """Images of one split on a device.

    Args:
        images: uint8 images (H, W, C) of equal size.
        device: device that keeps them.
        train: the transform whose random squares are taken; None returns the images as they are.

    Attributes:
        draw: transform of the samples that the loading processes make of `Labels`.
    """

    def __init__(self, images: Iterable[np.ndarray], device: torch.device, train: TrainTransform | None = None):
        self.images = torch.from_numpy(np.stack(list(images))).to(device)  # (N, H, W, C)
        self.train = train
        _, height, width, _ = self.images.shape
        self.draw: Callable[[dict], dict] = dict if train is None else DrawSquare(train, (height, width))

    @classmethod
    def of_training(cls, images: ArrayImages, transform: TrainTransform, device: torch.device) -> "Residents":
        """Return images that are resized as training resizes them, from which random squares are taken."""
        size, mode = transform.square_from(*images.images.shape[1:3]), transform.augment.interpolation
        return cls((resize(images.image(i), size, mode) for i in range(len(images))), device, transform)

    @classmethod
    def of_evaluation(cls, images: ArrayImages, transform: EvalTransform, device: torch.device) -> "Residents":
        """Return images that are resized and cropped for evaluation."""
        return cls((transform({"image": images.image(i)})["image"] for i in range(len(images))), device)

    def __call__(self, batch: dict) -> dict:
        """Add the images, uint8 (B, C, H, W) in channels-last memory, to a batch that has their `index`."""
        device = self.images.device
        index = batch["index"].to(device, non_blocking=True).clamp(min=0)
        if self.train is None:
            return batch | {"image": self.images[index].permute(0, 3, 1, 2)}
        squares = batch.pop("square").to(device, non_blocking=True)
        rows, columns = (self._positions(squares, axis) for axis in (0, 1))
        pixels = self.images[index[:, None, None], rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
        return batch | {"image": pixels.permute(0, 3, 1, 2)}

    def _positions(self, squares: Tensor, axis: int) -> Tensor:
        """Return the positions (B, length) of each square along an axis of the images, padded by mirroring."""
        assert self.train is not None
        side, length = self.images.shape[1 + axis], self.train.size[axis]
        steps = torch.arange(length, device=squares.device)
        start, mirrored = squares[:, axis, None], squares[:, 2 + axis, None]
        positions = (start + torch.where(mirrored > 0, length - 1 - steps, steps)).abs()
        return side - 1 - (side - 1 - positions).abs()


def fits(images: object, transform: TrainTransform | EvalTransform) -> bool:
    """Tell whether a split can be kept on the device: few images in memory, and pixels that will be the CPU's.

    Random resized crops stay on the CPU, as do ops of colour and shape unless the recipe wants them on the device.
    """
    if not isinstance(images, ArrayImages):
        return False
    size = images.images.shape[1:3]
    if isinstance(transform, TrainTransform):
        augment = transform.augment
        stored, size = size, transform.square_from(*size)
        if augment.scale is not None or (size != stored and augment.interpolation == "random"):
            return False
        if transform.color_and_shape.transforms and augment.device is None:
            return False
    else:
        size = transform.size
    return 3 * len(images) * size[0] * size[1] <= MAX_BYTES
