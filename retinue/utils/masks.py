"""Masks as data sets store them: the label of pixels that do not count, and COCO's run lengths."""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

IGNORED = 255  # label of the pixels that neither training nor evaluation counts


def run_lengths(segmentation: Any, height: int, width: int) -> Any:
    """A mask of COCO's format as pycocotools takes it: compressed run lengths.

    Raises:
        ValueError: it is not one, or not of an image of this size.
    """
    if isinstance(segmentation, list):
        rings = [ring for ring in segmentation if len(ring) >= 6]  # fewer than three corners enclose nothing
        if not rings:
            return coco_mask.encode(np.zeros((height, width), np.uint8, order="F"))
        return coco_mask.merge(coco_mask.frPyObjects(rings, height, width))
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"its size is {list(segmentation['size'])}, the image's [{height}, {width}]")
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation
