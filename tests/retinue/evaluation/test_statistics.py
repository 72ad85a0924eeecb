"""Confidence intervals of means over few values, and paired differences."""

import math

import numpy as np
import pytest
from scipy import stats

from retinue.evaluation.statistics import (
    Difference,
    bootstrap_difference,
    draw_images,
    holm,
    mcnemar,
    mean_ci95,
    paired_difference,
    rate_interval,
)

# Resamples of 300 images.
DRAWS = np.stack(list(draw_images(300, 300, 0)))


def test_intervals_cover_the_true_mean_in_95_percent_of_samples():
    rng = np.random.default_rng(0)
    covered = 0
    for sample in rng.normal(3.0, 2.0, (2000, 3)):
        mean, half = mean_ci95(sample)
        covered += abs(mean - 3.0) <= half
    # With the normal distribution's 1.96 instead of Student's t, the coverage would be 80 %.
    assert 0.935 < covered / 2000 < 0.965


def test_few_values():
    assert mean_ci95([0.5, 0.5]) == (0.5, 0.0)
    mean, half = mean_ci95([0.7])
    assert mean == pytest.approx(0.7) and math.isnan(half)


def test_intervals_of_rates_stay_between_0_and_1():
    mean, half = mean_ci95([1.0, 0.96, 0.99])
    assert mean + half > 1
    assert rate_interval([1.0, 0.96, 0.99]) == (pytest.approx(mean - half), 1.0)
    assert rate_interval([0.0, 0.0, 0.1])[0] == 0.0


def test_paired_difference_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (2, 5))
    difference, reference = paired_difference(a.tolist(), b.tolist()), stats.ttest_rel(a, b)
    interval, interval90 = reference.confidence_interval(0.95), reference.confidence_interval(0.9)
    same_within = max(-interval90.low, interval90.high)
    assert difference == pytest.approx((np.mean(a - b), interval.low, interval.high, reference.pvalue, same_within))
    # Two one-sided tests with the margin `same_within`.
    one_sided = [
        np.array(stats.ttest_1samp(a - b + sign * same_within, 0, alternative=alternative))[1]
        for sign, alternative in ((1, "greater"), (-1, "less"))
    ]
    assert max(one_sided) == pytest.approx(0.05)


def test_values_that_vary_together_are_told_apart_only_in_pairs():
    other, net = [0.1, 0.5, 0.9], [0.121, 0.52, 0.919]
    assert paired_difference(net, other).p < 0.01
    assert stats.ttest_ind(net, other)[1] > 0.9  # pyright: ignore[reportOperatorIssue]


def test_no_p_value_without_a_spread():
    assert math.isnan(paired_difference([0.75], [0.5]).p)
    assert math.isnan(paired_difference([0.75, 1.0], [0.5, 0.75]).p)


def test_holm_multiplies_the_smallest_by_all_and_keeps_the_order():
    """Check the example of Holm's method by hand: 0.01 x 4, then 0.02 x 3, then at least as much as before."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    adjusted = holm([math.nan, 0.04, 0.9])
    assert math.isnan(adjusted[0]) and adjusted[1:] == pytest.approx([0.08, 0.9])


def test_holm_keeps_the_level_over_many_comparisons():
    """Compare 10 equal nets in 1,000 experiments: some difference is found in at most 5 % of them."""
    rng = np.random.default_rng(0)
    found = 0
    for experiment in rng.normal(0, 1, (1000, 11, 5)):
        p_values = [paired_difference(net, other).p for net, other in zip(experiment[1:], experiment[:-1], strict=True)]
        found += min(holm(p_values)) < 0.05
    assert found / 1000 < 0.065


def test_mcnemar_is_the_exact_binomial_test():
    rng = np.random.default_rng(0)
    for n in (1, 7, 60, 400):
        a, b = rng.random(n) < 0.7, rng.random(n) < 0.6
        only_a, different = int((a & ~b).sum()), int((a ^ b).sum())
        expected = stats.binomtest(only_a, different).pvalue if different else 1.0
        assert mcnemar(a, b) == pytest.approx(expected) == mcnemar(b, a)
    assert mcnemar(np.ones(9, bool), np.ones(9, bool)) == 1.0


def simulate(rng: np.random.Generator, runs: int, difference: float, seed_std: float) -> Difference:
    """Compare two nets whose true accuracies differ by `difference`, in `runs` seeds on the same 300 new images.

    Images are of different difficulty, and the accuracy of a seed varies by `seed_std`.
    """
    easy = rng.uniform(0.3, 0.9, 300)
    seeds = rng.normal(0, seed_std, (2, runs, 1))
    a = rng.random((runs, 300)) < np.clip(easy + difference + seeds[0], 0, 1)
    b = rng.random((runs, 300)) < np.clip(easy + seeds[1], 0, 1)
    pairs = a.astype(float) - b
    return bootstrap_difference(pairs.mean(1).tolist(), DRAWS @ pairs.T / 300)


@pytest.mark.slow
@pytest.mark.parametrize(("runs", "seed_std"), [(1, 0.0), (3, 0.02), (3, 0.05), (5, 0.03)])
def test_intervals_of_differences_cover_the_truth_and_tests_keep_their_level(runs, seed_std):
    rng = np.random.default_rng(0)
    found = [simulate(rng, runs, 0.05, seed_std) for _ in range(1000)]
    assert 0.93 < np.mean([low <= 0.05 <= high for _, low, high, *_ in found]) < 0.985
    size = np.mean([simulate(rng, runs, 0.0, seed_std).p < 0.05 for _ in range(1000)])
    assert size < 0.07
    # A difference of 0.05 is found more often than none.
    assert np.mean([difference.p < 0.05 for difference in found]) > 2 * size - 0.03


def test_the_interval_has_the_parts_of_the_images_and_of_the_seeds():
    rng = np.random.default_rng(0)
    pairs = rng.choice([-1.0, 0.0, 1.0], 300, p=[0.2, 0.55, 0.25])
    resampled = np.stack(list(draw_images(300, 2000, 0))) @ np.stack([pairs] * 3).T / 300
    images_only = bootstrap_difference([pairs.mean()] * 3, resampled)
    assert images_only.high - pairs.mean() == pytest.approx(1.96 * pairs.std() / math.sqrt(300), rel=0.05)
    shift = np.array([-0.5, 0.0, 0.5])
    both = bootstrap_difference((pairs.mean() + shift).tolist(), resampled + shift)
    # With three seeds that differ by much, Student's t with about two degrees of freedom rules.
    assert both.high - both.mean == pytest.approx(4.303 * 0.5 / math.sqrt(3), rel=0.05)
    # Seeds that differ by the noise of their own images alone: nothing is added to the t-test.
    noisy = rng.normal(0, 1, (300, 3))
    draws = np.stack(list(draw_images(300, 2000, 0)))
    by_seed = bootstrap_difference(noisy.mean(0).tolist(), draws @ noisy / 300)
    assert by_seed.high - by_seed.low >= 2 * 1.8 / math.sqrt(900)


def test_equal_nets_are_the_same():
    assert bootstrap_difference([0.0], np.zeros((100, 1))) == (0, 0, 0, 1, 0)
    assert bootstrap_difference([0.0, 0.0], np.zeros((100, 2))) == (0, 0, 0, 1, 0)
