"""Check a split that has been loaded: labels beyond the classes, classes without a training image, very few images."""

import logging
from collections.abc import Sequence

import numpy as np
from pytorch_lightning.utilities import rank_zero_only

logger = logging.getLogger(__name__)
# Every process of a run reads the data, so only the first one says what it finds.
warn = rank_zero_only(logger.warning)

# A split of fewer images is warned of.
FEW = 10
# Number of classes that a warning names.
MAX_NAMES = 3


def check_labels(labels: np.ndarray, classes: Sequence[str], split: str) -> None:
    """Check that each label is a class, and log a warning if classes of the training split have no image.

    Args:
        labels: (N,), the labels of the split's images or objects.
        classes: names of the classes, by label.
        split: name of the split.

    Raises:
        ValueError: if a label is none of the classes.
    """
    present = np.unique(labels)
    beyond = present[(present < 0) | (present >= len(classes))]
    if beyond.size:
        raise ValueError(f"the data have the label {beyond[0]} in {split}, but {len(classes)} classes, from 0 on")
    missing = np.setdiff1d(np.arange(len(classes)), present)
    if split == "train" and missing.size:
        names = ", ".join(str(classes[label]) for label in missing[:MAX_NAMES])
        more = ", ..." if missing.size > MAX_NAMES else ""
        warn(
            "%d of %d classes occur in no training image and cannot be learnt: %s",
            missing.size,
            len(classes),
            names + more,
        )


def warn_of_few_images(count: int, split: str) -> None:
    """Log a warning if a split has very few images."""
    if count >= FEW:
        return
    images = "1 image" if count == 1 else f"{count} images"
    if split == "train":
        warn("the training split has only %s", images)
    else:
        warn("the split %s has only %s, so each is %.0f %% of its figures", split, images, 100 / count)
