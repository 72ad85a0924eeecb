"""The batch contract of all data sets, and the last step of a classification batch: ops, normalise, erase, mix.

A sample is a dict that describes one image; a batch is a dict that describes several. An image passes four steps:

1. `images[i]`, on the CPU, reads the sample at position i of a split. Its `image` is uint8 (H, W, 3), RGB, or float32
   (H, W, C) for images of many bands (`datamodules.bands`), which stay float32 and are not divided by 255.
2. The sample's transform, on the CPU, changes geometry and colours (`datamodules.transforms` for classification,
   `datamodules.dense_transforms` for detection and segmentation). Keys that it does not know pass through unchanged.
3. `collate`, on the CPU, joins the samples: `image` becomes uint8 (B, C, H, W) in channels-last memory.
4. `on_after_batch_transfer`, on the device that trains, normalises: `image` becomes float32. This is the batch that a
   task receives. With `augment.device`, it first applies the ops of colour and shape that step 2 drew.

Every batch that a task receives has these keys (B images, C channels):

    image           float32 (B, C, H, W), (value / 255 - mean) / std for each channel, in channels-last memory
    index           int64 (B,), position of each image in its split; -1 marks padding, which must not be counted
    seed            int, in training only: the source of all randomness that concerns the batch as a whole

Classification (K classes) adds:

    label           int64 (B,), 0 to K - 1
    target          float32 (B, K), in training with MixUp, CutMix or MaskMix only: mixed and smoothed labels
    mix             `datamodules.mixing.Mix`, with `target` only: which images were mixed, and where
    altered         float32 (B·V, C, H, W), in training with `augment.jsd` only: V AugMix views of all images, view by
                    view
    map_scores, map_labels, map_view   in training with label maps only: see `datamodules.token_maps`

Multi-label classification has instead:

    label           int64 (B, K), 1 for the classes in the image and 0 for the others
    target          float32 (B, K), in training with MixUp or CutMix only: mixed labels, which are not smoothed

Detection pads `image` with zeros and adds the following. Boxes are (x1, y1, x2, y2) in pixels of the resized image.
Each list has one tensor per image:

    sizes           int64 (B, 2), height and width of each image without its padding
    original_sizes  int64 (B, 2), in evaluation only: height and width of each image file
    boxes           list of float32 (N, 4), in training only: N objects; crowds are not among them
    labels          list of int64 (N,), in training only: 0 to K - 1
    ignored         list of float32 (M, 4), in training only: boxes of crowds, which are neither objects nor background
    masks           list of uint8 (N, h, w), in training only, if the data have masks and the detector uses them

Segmentation adds the following. Pixels with the label 255 (`retinue.utils.masks.IGNORED`) are not counted:

    mask            in training int64 (B, H, W), 0 to K - 1 or 255; padding of `image` is 0 and of `mask` 255
    image, mask     in evaluation lists of float32 (3, h, w) and int64 (H, W), because the sizes differ: images are
                    resized, masks keep the size of their file
    original_sizes  int64 (B, 2), in evaluation only: height and width of each mask file

A new data set subclasses `ClassificationData`, `DetectionData` or `SegmentationData`, defines `class_names`, and
returns its images from `load(split)`; a detection data set returns its annotations from `read(split)` instead. Steps 2
to 4 are inherited.
"""

import math
import weakref
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from datamodules.batch_ops import apply_batch_ops, to_grey
from datamodules.loader import private_rng, seed_rng
from datamodules.mixing import mix_images
from datamodules.transforms import Augment


def normalise(image: Tensor, mean: Tensor, std: Tensor, out: Tensor | None = None) -> Tensor:
    """Return (image / 255 - mean) / std; float32 images are in the units of `mean` and are not divided by 255.

    The computation runs on rows of W·C values, which keeps all three tensors contiguous. On a CPU this is twice as fast
    as broadcasting statistics of shape (C, 1, 1).

    Args:
        image: uint8 or float32 (B, C, H, W) in channels-last memory.
        mean: float32 (C,), for values from 0 to 1.
        std: float32 (C,), for values from 0 to 1.
        out: float32 (B, H, W, C), contiguous memory for the result; None takes new memory.

    Returns:
        float32 (B, C, H, W) in channels-last memory.
    """
    b, c, h, w = image.shape
    white = 255 if image.dtype == torch.uint8 else 1
    rows = image.permute(0, 2, 3, 1).reshape(b * h, w * c)
    rows = rows.to(torch.float32, copy=True) if out is None else out.view(b * h, w * c).copy_(rows)
    rows.sub_((white * mean).repeat(w)).div_((white * std).repeat(w))
    return rows.view(b, h, w, c).permute(0, 3, 1, 2)


@lru_cache
def channel_values(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return one value for each channel, float32 (C,), on a device: sending it for each batch would wait for a GPU."""
    return torch.tensor(values, dtype=torch.float32, device=device)


class Buffers:
    """Memory for large batches on the CPU, which is used again as soon as no tensor refers to it.

    Above 32 MB, glibc returns freed memory to the system, and the system takes four times as long to supply new pages
    as normalising takes.
    """

    SMALLEST = 32 * 2**20

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> Tensor | None:
        """Return float32 memory of this shape, with any content; None if it would be small."""
        if 4 * math.prod(shape) < self.SMALLEST:
            return None
        self._free[:] = [array for array in self._free if array.shape == shape]
        array = self._free.pop() if self._free else np.empty(shape, np.float32)
        # A tensor's storage refers to the view, which therefore lives as long as any tensor of this memory does.
        view = array[...]
        weakref.finalize(view, self._free.append, array).atexit = False
        return torch.from_numpy(view)


class BatchTransform:
    """Turn a loader's classification batch into the batch that a net takes.

    The `ops` that were drawn for the images are applied, if there are any; `image` becomes float32 and normalised. A
    training batch is a batch with a `seed`, which determines all other randomness here. Its images are also erased and
    mixed; with mixing it gets `target`, float32 (B, K), the smoothed and mixed labels. Erasing is timm's RandomErasing
    and comes before mixing, as in timm.

    Args:
        mean: mean of each channel, for values from 0 to 1.
        std: standard deviation of each channel, for values from 0 to 1.
        num_classes: K.
        augment: the recipe's augmentation; its fields for erasing, mixing and label smoothing apply.
        fill: colour of pixels that an op takes from outside the image.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        num_classes: int,
        augment: Augment,
        fill: tuple[int, ...] = (0, 0, 0),
    ):
        self.mean, self.std = tuple(mean), tuple(std)
        self.num_classes, self.augment, self.fill = num_classes, augment, fill
        self._buffers = Buffers()

    def __call__(self, batch: dict) -> dict:
        image = batch["image"]
        device = image.device
        mean, std = (channel_values(values, device) for values in (self.mean, self.std))
        if "ops" in batch:
            image = apply_batch_ops(image, batch["ops"], self.fill)
            batch = {key: value for key, value in batch.items() if key != "ops"}
        if image.shape[1] > len(self.mean):
            image = to_grey(image)
        views = batch.get("altered")
        if views is not None:
            # (B, V, H, W, C) → (B·V, C, H, W), view by view
            image = torch.cat([image, views.transpose(0, 1).flatten(0, 1).permute(0, 3, 1, 2)])
        b, c, h, w = image.shape
        image = normalise(image, mean, std, self._buffers.take((b, h, w, c)) if device.type == "cpu" else None)
        augment, mix = self.augment, None
        if "seed" in batch and (augment.erasing or augment.mixes):
            with private_rng(device):
                seed_rng(batch["seed"], device=device)
                if augment.erasing:
                    RandomErasing(augment.erasing, mode=augment.erasing_mode, device=str(device))(image)
                if augment.mixes:
                    mix = mix_images(image, augment)
        batch = batch | {"image": image}
        if views is not None:
            count = len(batch["label"])
            batch |= {"image": image[:count], "altered": image[count:]}
        if mix is not None:
            target = mix.targets(batch["label"], self.num_classes, augment.label_smoothing)
            batch |= {"mix": mix, "target": target}
        return batch
