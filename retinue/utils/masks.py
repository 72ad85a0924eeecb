"""Masks: the label of pixels that do not count, and distances."""

from collections.abc import Sequence

import numpy as np

# Label of the pixels that neither training nor evaluation counts.
IGNORED = 255


def distances_from(region: np.ndarray, spacing: Sequence[float] = (1.0, 1.0)) -> np.ndarray:
    """Return the distance of each pixel from the nearest pixel of a region, float64 (H, W).

    Args:
        region: bool (H, W), with at least one pixel of the region.
        spacing: Distances between the centres of neighbours (vertical, horizontal), the unit of the result.
    """
    from scipy.ndimage import distance_transform_edt

    return np.asarray(distance_transform_edt(~region, sampling=spacing))
