"""What the data of detection and of segmentation share: image sizes and geometry."""

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any

from datamodules.base import ImageData
from datamodules.dense_transforms import DenseAugment, DenseEvalTransform, DenseTrainTransform, check_limits


class DenseData(ImageData, ABC):
    """Colour images of any size, with something at their places.

    Args:
        image_size: [short, long]: images are resized with their ratio kept, to be as large as they can be with a
            shorter side of at most `short` and a longer side of at most `long`.
        flip: whether mirrored objects keep their classes; if not, the recipe's hflip is not applied.
        augment: the recipe's augmentation, the fields of `datamodules.dense_transforms.DenseAugment`; None: none.
        common: arguments of `ImageData`.
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
        self.augment = DenseAugment.from_config(dict(augment or {}) | ({} if flip else {"hflip": 0.0}))
        self.train_transform = DenseTrainTransform(self.augment, (short, long))
        self.eval_transform = DenseEvalTransform((short, long))
