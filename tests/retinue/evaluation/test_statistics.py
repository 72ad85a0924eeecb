"""Confidence intervals of means over few values, and paired differences."""

import math

import numpy as np
import pytest
from scipy import stats

from retinue.evaluation.statistics import holm, mean_ci95, paired_difference, rate_interval


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
    interval = reference.confidence_interval(0.95)
    assert difference == pytest.approx((np.mean(a - b), interval.low, interval.high, reference.pvalue))


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
