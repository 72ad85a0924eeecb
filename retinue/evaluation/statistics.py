"""Figures over images and seeds: means, confidence intervals, bootstrap, and paired differences between two nets."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr, stdtr, stdtrit

# Bias of average precision in a set of n images is proportional to n ** -BIAS_POWER (`half_sample_intervals`).
BIAS_POWER = 2 / 3
# Standard error of average precision less its bias, relative to that of average precision, in simulations.
CORRECTION_ERROR = 1.04


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
        low: Lower end of its 95 % confidence interval.
        high: Upper end of the interval.
        p: p-value, two-sided, of the test that the mean difference is 0.
        same_within: Smallest margin within which a and b are equal by two one-sided tests of level 5 % (Schuirmann
            1987): the larger absolute end of the 90 % interval.
    """

    mean: float
    low: float
    high: float
    p: float
    same_within: float


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compare two nets by values that belong together, such as those of runs with the same seed, by Student's t.

    With one pair, all but the mean is NaN; p is also NaN if all differences are equal, since the spread is unknown.

    Raises:
        ValueError: There is no value, or the numbers of values differ.
    """
    n, mean, std, _ = summarise([x - y for x, y in zip(a, b, strict=True)])
    if n == 1:
        return Difference(mean, math.nan, math.nan, math.nan, math.nan)
    difference = _by_t(mean, std / math.sqrt(n), n - 1)
    return difference if std > 0 else difference._replace(p=math.nan)


def _by_t(mean: float, error: float, freedom: float) -> Difference:
    """Return the difference whose standard error has these degrees of freedom."""
    half, half90 = (float(stdtrit(freedom, level)) * error for level in (0.975, 0.95))
    p = 2 * float(stdtr(freedom, -abs(mean) / error)) if error > 0 else float(mean == 0)
    return Difference(mean, mean - half, mean + half, p, abs(mean) + half90)


def draw_images(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield for each resample of n images how often it draws each of them: float64 (n,)."""
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)


def percentile_intervals(observed: np.ndarray, resampled: np.ndarray) -> np.ndarray:
    """Return the 95 % percentile intervals of figures, (F, 2); NaN for an undefined figure, or without resamples.

    Args:
        observed: (F,), the figures; NaN if undefined.
        resampled: (R, F), the figures of each resample; a resample in which a figure is undefined does not count.
    """
    intervals = np.full((len(observed), 2), np.nan)
    defined = np.isfinite(observed)
    if len(resampled):
        defined &= np.isfinite(resampled).any(0)
    if len(resampled) and defined.any():
        intervals[defined] = np.nanpercentile(resampled[:, defined], [2.5, 97.5], axis=0).T
    return intervals


def draw_halves(n: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """Yield half-samples of n images, each followed by its other half: float64 (n,), 1 for the images that are in it.

    Args:
        n: number of images.
        count: number of half-samples, which is even.
        seed: seed of the half-samples.
    """
    rng = np.random.default_rng(seed)
    for _ in range(count // 2):
        half = np.zeros(n)
        half[rng.permutation(n)[: n // 2]] = 1
        yield half
        yield 1 - half


def correct_bias(observed: np.ndarray, halves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return figures less their bias, and resamples with the spread of these figures; see `half_sample_intervals`.

    Args:
        observed: (F,), the figures.
        halves: (R, F), the figures of each half-sample.

    Returns:
        The figures (F,), and the resamples (R, F), whose mean they are. A half-sample in which a figure is undefined
        does not count; a figure that is undefined in all of them is NaN.
    """
    counts = np.isfinite(halves).sum(0)
    mean = np.divide(np.nansum(halves, 0), counts, out=np.full(len(observed), np.nan), where=counts > 0)
    corrected = observed - (mean - observed) / (2**BIAS_POWER - 1)
    return corrected, corrected + CORRECTION_ERROR * (halves - mean)


def half_sample_intervals(observed: np.ndarray, halves: np.ndarray, n: int) -> np.ndarray:
    """Return the 95 % intervals of figures between 0 and 1 whose bias falls slowly with the number of images: (F, 2).

    Average precision is biased upwards, since it takes for each recall the maximum of the precisions from there on. The
    bias of such a monotone envelope falls as n^(-2/3) (Groeneboom 1985, Estimating a Monotone Density), so that the
    mean over classes with few objects is off by a standard error and more. A bootstrap finds only a part of the bias:
    its copies of images have equal scores. Half-samples have none (delete-d jackknife, Shao and Wu 1989, A General
    Theory for Jackknife Variance Estimation). Their variance is that of the figure, and from their mean follows the
    bias. The intervals are Student's t, of the arcsine of the square root of the figures.

    Args:
        observed: (F,), the figures; NaN if undefined.
        halves: (R, F), the figures of each half-sample.
        n: number of images.

    Returns:
        The intervals; NaN for a figure that is undefined, or that fewer than two half-samples have.
    """
    corrected, resamples = correct_bias(np.arcsin(np.sqrt(observed)), np.arcsin(np.sqrt(halves)))
    counts = np.isfinite(resamples).sum(0)
    squares = np.nansum((resamples - corrected) ** 2, 0)
    error = np.sqrt(np.divide(squares, counts - 1, out=np.full(len(observed), np.nan), where=counts > 1))
    margin = float(stdtrit(n - 1, 0.975)) * math.sqrt(n / (n - 1)) * error
    limits = np.stack([corrected - margin, corrected + margin], -1)
    return np.sin(np.clip(limits, 0, math.pi / 2)) ** 2


def bootstrap_difference(observed: Sequence[float], resampled: np.ndarray) -> Difference:
    """Compare two nets on the same test images, over n pairs of runs with the same seed.

    One pair has the percentile interval of the bootstrap over images. With several pairs, the interval covers the
    choice of the seeds as well as that of the images. A hierarchical bootstrap, which resamples the seeds too, has the
    wrong length for few seeds, so it is replaced by its two parts of the variance: the one over the seeds, by Student's
    t as in `paired_difference`, and what the images add that all seeds share, by the bootstrap. The degrees of freedom
    are Satterthwaite's (1946).

    Args:
        observed: (n,), difference of the figure in each pair.
        resampled: (R, n), the same in each resample of the images, which all pairs share.
    """
    differences = np.asarray(observed, np.float64)
    resampled = resampled[np.isfinite(resampled).all(1)]
    n, mean = len(differences), float(differences.mean())
    if n == 1:
        low, low90, high90, high = np.percentile(resampled[:, 0], [2.5, 5, 95, 97.5]).tolist()
        # The observed difference counts as one more resample, so that p is never 0.
        tails = (resampled[:, 0] <= 0).sum(), (resampled[:, 0] >= 0).sum()
        p = min(1.0, 2 * (min(tails) + 1) / (len(resampled) + 1))
        return Difference(mean, low, high, float(p), max(abs(low90), abs(high90)))
    over_images = resampled.mean(1).var(ddof=1)
    # Noise of the images that differs between the seeds is a part of the variance over the seeds already.
    noise = (resampled - resampled.mean(1, keepdims=True)).var(0, ddof=1).sum() / (n - 1) / n
    over_seeds = differences.var(ddof=1) / n
    # Seeds that happen to agree tell no less than the images do.
    variance = max(over_images, over_seeds + max(0.0, over_images - noise))
    freedom = (n - 1) * (variance / over_seeds) ** 2 if over_seeds > 0 else math.inf
    return _by_t(mean, math.sqrt(variance), freedom)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Return the p-value of McNemar's exact test (1947), two-sided, that two nets are right equally often.

    Args:
        a: bool (N,), whether the first net is right about each image.
        b: bool (N,), the same of the second net.
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


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
