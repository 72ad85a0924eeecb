"""Check the masks of a user's own folder before training: classes without a pixel, and masks of 0 and 255."""

import logging
from collections.abc import Sequence

import numpy as np
from pytorch_lightning.utilities import rank_zero_only

from datamodules.decode import BrokenImage
from datamodules.segmentation import MaskedImages
from retinue.utils.masks import IGNORED

logger = logging.getLogger(__name__)
# Every process of a run reads the data, so only the first one says what it finds.
warn = rank_zero_only(logger.warning)

# Number of masks after which a search for the missing classes is given up.
MAX_MASKS = 1000


def check_masks(images: MaskedImages, classes: Sequence[str], split: str) -> None:
    """Read masks until each class has been seen, and say which classes have no pixel.

    A usual data set takes a few masks. Masks that cannot be read are skipped; the loader reports them.

    Args:
        images: the images of the split.
        classes: names of the classes, by label.
        split: name of the split. Classes without a pixel are reported for the split train only.

    Raises:
        ValueError: if no mask has a pixel of an object, and the masks have ignored pixels: 255 is probably meant to be
            a class. Also if a mask has an invalid value.
    """
    # Label 0 is the background if its value is 0 and there are other classes.
    first = 1 if images.mask_values[0] == 0 and len(classes) > 1 else 0
    objects = set(range(first, len(classes)))
    missing, ignored, count = set(range(len(classes))), False, 0
    for count in range(len(images) + 1):
        some_object = not objects <= missing
        if count == len(images) or not missing or (some_object and (split != "train" or count >= MAX_MASKS)):
            break
        try:
            labels = np.unique(images.mask(count))
        except BrokenImage:
            continue
        missing -= set(labels.tolist())
        ignored |= IGNORED in labels
    names = ", ".join(classes[label] for label in sorted(missing))
    if objects <= missing and ignored:
        raise ValueError(
            f"{images.folders[1]}: no mask has a pixel of {names}, and 255 marks pixels that are ignored. If 255 is an "
            "object here, data.values says so: the mask value of each class, such as data.values=[0,255]"
        )
    if missing and split == "train" and count == len(images):
        warn("%s: no training mask has a pixel of %s, so it cannot be learnt", images.folders[1], names)
