"""Masks in COCO's formats: polygons and run lengths."""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def encloses_pixels(segmentation: Any) -> bool:
    """Tell whether a mask in one of COCO's formats can enclose a pixel.

    As in mmdetection, a polygon needs three corners and as many x as y. Run lengths need a run inside the object, which
    is looked for in plain ones only.
    """
    if isinstance(segmentation, list):
        return any(isinstance(ring, list) and len(ring) >= 6 and len(ring) % 2 == 0 for ring in segmentation)
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list):
        return any(segmentation["counts"][1::2])
    return bool(segmentation)


def run_lengths(segmentation: Any, height: int, width: int) -> Any:
    """Convert a mask in one of COCO's formats to compressed run lengths, the format that pycocotools takes.

    Args:
        segmentation: Polygons as lists of x and y in turn, or a mapping with `size` and `counts` (run lengths, plain or
            compressed).
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Raises:
        ValueError: The mask is not in COCO's format, or its size is not that of the image.
    """
    if not encloses_pixels(segmentation):
        return coco_mask.encode(np.zeros((height, width), np.uint8, order="F"))
    if isinstance(segmentation, list):
        rings = [ring for ring in segmentation if encloses_pixels([ring])]
        return coco_mask.merge(coco_mask.frPyObjects(rings, height, width))
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"its size is {list(segmentation['size'])}, the image's [{height}, {width}]")
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation
