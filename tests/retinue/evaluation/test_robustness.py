"""Figures of a robustness panel, the mean corruption error by hand, and what attacks may and must do."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from datamodules.corruption_levels import BENCHMARK
from retinue.evaluation.attacks import Ball, fgsm, pgd
from retinue.evaluation.classification import wilson
from retinue.evaluation.robustness import ALEXNET_ERRORS, Row, group_figures, mean_corruption_error, mean_interval

MEAN, STD = torch.tensor([[[0.5]]]), torch.tensor([[[0.25]]])


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """Return a small net that has learnt half of the digits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 10))
    image, label = digits(slice(0, 900))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(image), label).backward()
        optimizer.step()
    return model.eval()


def digits(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    image = torch.tensor(pixels[part] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    return (image - MEAN) / STD, torch.tensor(labels[part])


def attacked(net: nn.Module, epsilon: float, steps: int = 10) -> dict[str, torch.Tensor]:
    image, label = digits(slice(900, 1300))
    ball = Ball(image, epsilon, MEAN, STD)
    start = torch.rand(image.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"clean": image, "fgsm": fgsm(net, label, ball), "pgd": pgd(net, label, ball, start, steps), "label": label}


def accuracy(net: nn.Module, image: torch.Tensor, label: torch.Tensor) -> float:
    return float((net(image).argmax(1) == label).float().mean())


@pytest.mark.parametrize("epsilon", [2 / 255, 16 / 255, 0.3])
def test_attacks_stay_in_the_ball_and_in_the_range_of_images(net, epsilon):
    images = attacked(net, epsilon)
    clean = images["clean"] * STD + MEAN
    for name in ("fgsm", "pgd"):
        pixels = images[name] * STD + MEAN
        assert (pixels - clean).abs().max() <= epsilon + 1e-6
        # The attacks use the whole ball.
        assert (pixels - clean).abs().max() >= 0.99 * epsilon
        assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6


def test_pgd_is_no_weaker_than_fgsm_and_more_change_is_worse(net):
    before = [parameter.grad for parameter in net.parameters()]
    rates = []
    for epsilon in (4 / 255, 16 / 255, 32 / 255):
        images = attacked(net, epsilon)
        clean, by_fgsm, by_pgd = (accuracy(net, images[name], images["label"]) for name in ("clean", "fgsm", "pgd"))
        assert clean > 0.85
        assert by_pgd <= by_fgsm <= clean
        losses = [cross_entropy(net(images[name]), images["label"]) for name in ("fgsm", "pgd")]
        assert losses[1] >= losses[0]
        rates.append(by_pgd)
    assert rates[0] > rates[1] > rates[2]
    # Attacks leave no gradients in the net.
    assert all(old is parameter.grad for old, parameter in zip(before, net.parameters(), strict=True))


def test_fgsm_finds_the_worst_image_of_a_linear_net():
    torch.manual_seed(0)
    layer = nn.Linear(4, 2, bias=False)
    linear = nn.Sequential(nn.Flatten(), layer)
    image, label = torch.zeros(1, 1, 2, 2), torch.tensor([0])
    worst = fgsm(linear, label, Ball(image, 0.1, MEAN, STD))
    weight = layer.weight.detach()
    # The margin of a linear net sinks by epsilon times the sum of the absolute differences of the weights.
    scores = linear(worst).detach()[0]
    margin = scores[0] - scores[1]
    assert float(margin) == pytest.approx(-float((weight[0] - weight[1]).abs().sum() * 0.1 / 0.25), rel=1e-5)


def test_the_mean_corruption_error_by_hand():
    assert tuple(ALEXNET_ERRORS) == BENCHMARK
    # AlexNet's mean error over all corruptions, as the paper's table says, is 78.9 %.
    assert np.mean(list(ALEXNET_ERRORS.values())) == pytest.approx(0.7890, abs=5e-4)
    same = {name: [error] * 5 for name, error in ALEXNET_ERRORS.items()}
    assert mean_corruption_error(same) == pytest.approx(1)
    # Half of AlexNet's error in one corruption of the 15: 1 - 0.5 / 15.
    assert mean_corruption_error(same | {"fog": [0.819324 / 2] * 5}) == pytest.approx(1 - 0.5 / 15)
    # The mean over severities comes before the division.
    assert mean_corruption_error(same | {"fog": [0, 0, 0, 0, 5 * 0.819324]}) == pytest.approx(1)


def row(group: str, name: str, level: object, correct: list[bool], clean: float = 0.9) -> Row:
    return Row(group, name, level, np.arange(len(correct)), np.array(correct), clean)


def test_rows_and_groups_have_their_figures():
    rows = [row("corruption", "fog", 1, [True] * 4), row("corruption", "fog", 5, [True, False, False, False])]
    described = rows[1].describe()
    assert described["top1"] == 0.25 and described["gap"] == pytest.approx(0.65) and described["n"] == 4
    assert described["top1_ci95"] == wilson(0.25, 4).tolist()
    figures = group_figures([*rows, row("a", "a", None, [True, False])])
    assert figures["robust_corruption"] == 0.625 and figures["robust_a"] == 0.5
    assert figures["robust_a_ci95"] == wilson(0.5, 2).tolist()
    assert "mce" not in figures
    low, high = figures["robust_corruption_ci95"]
    assert low < 0.625 < high
    other = Row("corruption", "snow", 1, np.arange(3), np.ones(3, bool), 0.9)
    assert "robust_corruption_ci95" not in group_figures([*rows, other])
    by_set = [row("imagenet_c", name, 1, [True, False]) for name in BENCHMARK]
    expected = np.mean([0.5 / error for error in ALEXNET_ERRORS.values()])
    assert group_figures(by_set)["mce"] == pytest.approx(expected)
    assert "mce" not in group_figures(by_set[1:])


def test_the_interval_of_a_mean_over_sets_is_that_over_images():
    """Sets that agree about every image tell no more than one of them."""
    once = np.random.default_rng(0).random((1, 400)) < 0.7
    (low, high), (low3, high3) = mean_interval(once), mean_interval(once.repeat(3, 0))
    assert high - low == pytest.approx(high3 - low3, rel=0.1)
