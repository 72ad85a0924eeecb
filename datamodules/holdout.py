"""Images that are held out of the training split, by which a search judges without using validation or test images."""

import numpy as np

from datamodules.images import LabelledImages, Subset, index_in_class

# Seed of the choice, which is the same for all runs.
SEED = 0


def hold_out(images: LabelledImages, count: int) -> tuple[Subset, Subset]:
    """Return the images without `count` of each class, and these.

    Args:
        images: Images of the training split.
        count: Number of images that are held out of each class.

    Raises:
        ValueError: A class has too few images to leave one for the training.
    """
    labels = images.labels
    smallest = int(np.bincount(labels)[np.unique(labels)].min())
    if count >= smallest:
        raise ValueError(
            f"task.holdout={count} leaves no training image of the smallest class, which has {smallest}; "
            f"task.holdout={max(1, smallest // 5)} holds out a fifth"
        )
    order = np.random.default_rng(SEED).permutation(len(labels))
    held = np.empty(len(labels), bool)
    held[order] = index_in_class(labels[order]) < count
    return Subset(images, np.flatnonzero(~held)), Subset(images, np.flatnonzero(held))
