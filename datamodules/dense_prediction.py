"""Base class of the detection and segmentation data modules: image sizes and augmentation of dense prediction."""

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any

from datamodules.base import ImageData
from datamodules.dense_transforms import DenseAugment, DenseEvalTransform, DenseTrainTransform, check_limits


class DensePredictionData(ImageData, ABC):
    """Colour images of any size whose annotations have positions: boxes, or a label for each pixel.

    Args:
        image_size: [short, long]. An image is resized with its aspect ratio kept, to the largest size with a shorter
            side of at most `short` and a longer side of at most `long`.
        flip: whether mirrored objects keep their classes. If they do not, the recipe's hflip is not applied.
        augment: the recipe's augmentation, with the fields of `datamodules.dense_transforms.DenseAugment`. None means
            no augmentation.
        batch_size: number of images per step and device.
        common: arguments of `ImageData`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        *,
        image_size: Sequence[int],
        flip: bool = True,
        augment: Mapping | None = None,
        batch_size: int = 2,
        **common: Any,
    ):
        super().__init__(image_size=check_limits(image_size), batch_size=batch_size, **common)
        if self.in_chans != 3:
            raise ValueError(f"data.in_chans must be 3 for detection and segmentation, not {self.in_chans}")
        short, long = image_size
        config = {} if augment is None else dict(augment)
        if not flip:
            config["hflip"] = 0.0
        self.augment = DenseAugment.from_config(config)
        self.train_transform = DenseTrainTransform(self.augment, (short, long))
        self.eval_transform = DenseEvalTransform((short, long))
