import math

import numpy as np
import pytest

from retinue.evaluation.statistics import mean_ci95


def test_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for sample in rng.normal(3.0, 2.0, (2000, 3)):
        mean, half = mean_ci95(sample)
        inside += abs(mean - 3.0) <= half
    assert 0.935 < inside / 2000 < 0.965  # the normal's 1.96 would cover 80 %


def test_few_values():
    assert mean_ci95([0.5, 0.5]) == (0.5, 0.0)
    mean, half = mean_ci95([0.7])
    assert mean == pytest.approx(0.7) and math.isnan(half)
