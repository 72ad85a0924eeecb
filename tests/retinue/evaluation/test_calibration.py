"""The temperature minimises the cross-entropy, and makes the confidences of a simulated net true."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from retinue.evaluation.calibration import HIGHEST, LOWEST, calibrated_figures, find_temperature, loss_slope
from retinue.evaluation.classification import summarize, topk_predictions


def simulate(num_images: int, temperature: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (N, 7) whose softmax at this temperature is the true distribution of the labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_images, 7, dtype=torch.float64, generator=generator)
    label = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return temperature * logits, label


def fit(logits: torch.Tensor, label: torch.Tensor) -> float:
    return find_temperature(lambda inverse: loss_slope(logits, label, inverse))


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_is_that_of_a_grid_search_and_near_the_true_one(true):
    logits, label = simulate(1500, true, 0)
    found = fit(logits, label)
    grid = found * torch.linspace(0.9, 1.1, 401, dtype=torch.float64)
    losses = torch.stack([F.cross_entropy(logits / t, label) for t in grid])
    # The best point of the grid is its centre, which is the fitted temperature.
    assert int(losses.argmin()) == 200
    assert found == pytest.approx(true, rel=0.15)


def test_the_slope_is_the_derivative():
    logits, label = simulate(50, 2.0, 1)
    inverse = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(logits * inverse, label, reduction="sum").backward()
    assert loss_slope(logits, label, 0.7) == pytest.approx(float(inverse.grad or 0), rel=1e-10)


def test_the_range_ends_where_no_temperature_is_best():
    logits, _ = simulate(50, 1.0, 2)
    assert fit(logits, logits.argmax(1)) == LOWEST
    assert fit(logits, logits.argmin(1)) == HIGHEST


def test_calibrated_figures_are_better_and_those_of_the_divided_logits():
    logits, label = simulate(1500, 3.0, 3)
    temperature = fit(*simulate(1500, 3.0, 4))
    index, names = torch.arange(len(label)), [str(i) for i in range(7)]
    before = summarize(topk_predictions(logits, label, index), names, resamples=50)
    calibrated = topk_predictions(logits / temperature, label, index)
    after = calibrated_figures(calibrated, names, temperature)
    assert after["calibrated_loss"] == pytest.approx(float(F.cross_entropy(logits / temperature, label)), rel=1e-5)
    assert after["calibrated_ece"] < 0.05 < 0.15 < before["ece"]
    assert after["calibrated_adaptive_ece"] < before["adaptive_ece"] and after["calibrated_brier"] < before["brier"]
    low, high = after["calibrated_loss_ci95"]
    assert low < after["calibrated_loss"] < high < before["loss"]
    assert after["temperature"] == temperature and np.array_equal(calibrated.topk[:, 0], logits.argmax(1).numpy())
