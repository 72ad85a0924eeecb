"""Images that are held out of the training split: for validation, or for a search that judges without validation."""

import numpy as np

from datamodules.images import LabelledImages, Subset, index_in_class

# Seed of the choice, which is the same for all runs.
SEED = 0
# One of every so many images is for validation if the data have no such split.
VALIDATION_EVERY = 5


def part_of_split(places: np.ndarray, split: str) -> np.ndarray:
    """Return which images are in `split`, train or val, of data without a validation split: bool (n,).

    Args:
        places: (n,) place of each image, among all images or among those of its class.
        split: Name of the split.
    """
    return (places % VALIDATION_EVERY == 0) == (split == "val")


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
