"""Sizes of training images that change during training."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

# Side, or (height, width), in pixels.
Size = int | tuple[int, int]


@dataclass(frozen=True)
class SizeSchedule:
    """Size of the images of each batch, which follows from the seed, the epoch and the number of the batch alone.

    - By epoch: the sizes follow one another in stages of equal length (progressive learning: EfficientNetV2,
      arXiv:2104.00298, section 4.2).
    - By step: each batch draws one of the sizes, the same on all ranks (multi-scale training: YOLO9000,
      arXiv:1612.08242, section 2).

    Args:
        sizes: The sizes.
        by_step: Draw a size for each batch.
        seed: Seed of what is drawn.
        epochs: Number of epochs of the training.
    """

    sizes: Sequence[Size]
    by_step: bool
    seed: int
    epochs: int

    def __call__(self, epoch: int, step: int) -> Size:
        """Return the size of the images of the batch `step` of an epoch; both count from 0."""
        if self.by_step:
            return random.Random(repr(("size", self.seed, epoch, step))).choice(self.sizes)
        return self.sizes[min(epoch * len(self.sizes) // self.epochs, len(self.sizes) - 1)]
