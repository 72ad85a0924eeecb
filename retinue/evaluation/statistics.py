"""Means over seeds, and how sure they are."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit


class Summary(NamedTuple):
    """Of n values; a spread of fewer than two is not a number."""

    n: int
    mean: float
    std: float  # of a sample (n - 1)
    ci95: float  # half the width of the mean's 95 % confidence interval by Student's t


def summarise(values: Sequence[float]) -> Summary:
    """Mean and spread; the interval is over what differs between the values (seeds, say), not over the test images.

    Raises:
        ValueError: there is no value.
    """
    n = len(values)
    if not n:
        raise ValueError("no values to take the mean of")
    std = float(np.std(values, ddof=1)) if n > 1 else math.nan
    half = float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n) if n > 1 else math.nan
    return Summary(n, float(np.mean(values)), std, half)


def mean_ci95(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval; see `summarise`."""
    summary = summarise(values)
    return summary.mean, summary.ci95
