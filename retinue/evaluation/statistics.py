"""Figures over several seeds: mean, confidence interval, and paired differences between two nets."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit


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


def rate_interval(rates: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of rates; see `summarise`. It is cut off at 0 and 1."""
    mean, half_width = mean_ci95(rates)
    return max(0.0, mean - half_width), min(1.0, mean + half_width)


class Difference(NamedTuple):
    """Mean difference between paired values.

    Attributes:
        mean: Mean of a - b.
        low: Lower end of its 95 % confidence interval by Student's t.
        high: Upper end of the interval.
        p: p-value of the paired t-test, two-sided, that the mean difference is 0.
    """

    mean: float
    low: float
    high: float
    p: float


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compare two nets by values that belong together, such as those of runs with the same seed.

    With one pair, interval and p are NaN; p is NaN also if all differences are equal, since nothing tells their spread.

    Raises:
        ValueError: There is no value, or the numbers of values differ.
    """
    n, mean, std, half_width = summarise([x - y for x, y in zip(a, b, strict=True)])
    p = 2 * float(stdtr(n - 1, -abs(mean) / std * math.sqrt(n))) if std > 0 else math.nan
    return Difference(mean, mean - half_width, mean + half_width, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number by Holm's method (1979): any error at all has the level of one test.

    NaN values belong to no test: they stay NaN and do not count.
    """
    tested = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted = list(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = largest
    return adjusted
