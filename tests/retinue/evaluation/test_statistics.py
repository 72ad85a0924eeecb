"""Confidence intervals of means over few values."""

import math

import numpy as np
import pytest

from retinue.evaluation.statistics import mean_ci95


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
