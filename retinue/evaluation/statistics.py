"""Mean, standard deviation and confidence interval of a figure over several seeds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit


class Summary(NamedTuple):
    """Summary of n values.

    Attributes:
        n: number of values.
        mean: mean of the values.
        std: standard deviation of the sample (divisor n - 1); NaN for one value.
        ci95: half the width of the 95 % confidence interval of the mean by Student's t; NaN for one value.
    """

    n: int
    mean: float
    std: float
    ci95: float


def summarise(values: Sequence[float]) -> Summary:
    """Return the mean of the values, their standard deviation and a confidence interval.

    The interval covers the variation between the values, for example between seeds, not between the test images.

    Raises:
        ValueError: if there is no value.
    """
    n = len(values)
    if not n:
        raise ValueError("no values to take the mean of")
    std = float(np.std(values, ddof=1)) if n > 1 else math.nan
    half_width = float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n) if n > 1 else math.nan
    return Summary(n, float(np.mean(values)), std, half_width)


def mean_ci95(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % confidence interval; see `summarise`."""
    summary = summarise(values)
    return summary.mean, summary.ci95
