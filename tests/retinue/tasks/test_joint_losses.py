"""Losses of the joint-embedding methods against their definitions, in loops and in float64."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from retinue.tasks.methods.contrastive_losses import amcl, nt_xent
from retinue.tasks.methods.joint_embedding_losses import (
    invariance,
    self_distillation,
    sigreg,
    unit_directions,
    vicreg,
)
from retinue.tasks.methods.projectors import PairTemperature

HEADS, DIM = 2, 5


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def unit(x: torch.Tensor) -> np.ndarray:
    values = x.double().numpy()
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def assert_equal(value: torch.Tensor, definition: float) -> None:
    assert value.shape == () and abs(float(value) - definition) < 1e-5 * abs(definition)


def two_views(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the index of each view's positive and of itself among 2 * images views, as in SimCLR."""
    own = torch.arange(2 * images)
    return own.roll(images), own


@pytest.mark.parametrize("left_out", [True, False])
def test_nt_xent(left_out):
    z, (positive, own) = randn(HEADS, 8, DIM), two_views(4)
    total = 0.0
    for c in range(HEADS):
        u = unit(z[c])
        for i in range(8):
            scores = {j: math.exp(u[i] @ u[j] / 0.3) for j in range(8) if j != i or not left_out}
            total -= math.log(scores[int(positive[i])] / sum(scores.values())) / 8
    assert_equal(nt_xent(z, z, positive, own if left_out else None, temperature=0.3), total)


def test_amcl():
    z, (positive, own) = randn(HEADS, 8, DIM), two_views(4)
    temperature, penalty = PairTemperature(HEADS, DIM, (0.1, 2.0)).requires_grad_(False), 0.3
    total = 0.0
    for c in range(HEADS):
        u = unit(z[c])
        for i in range(8):
            p = int(positive[i])
            hardest = max((j for j in range(8) if j not in (i, p)), key=lambda j: u[i] @ u[j])
            t, v = (float(temperature(z[:, i : i + 1], z[:, j : j + 1])[c, 0]) for j in (p, hardest))
            omega = [DIM / 2 * math.log(x) + 1 / x for x in (t, v)]
            total += (u[i] @ u[hardest] / v - u[i] @ u[p] / t + penalty * (omega[0] - omega[1])) / 8
    assert_equal(amcl(z, z, positive, own, temperature=temperature, penalty=penalty), total)


def test_amcl_with_the_whole_penalty_is_a_ratio_of_gaussian_densities():
    z, (positive, own) = randn(1, 6, DIM), two_views(3)
    temperatures = iter([torch.full((1, 6), 0.4), torch.full((1, 6), 0.7)])
    loss = amcl(z, z, positive, own, temperature=lambda first, second: next(temperatures), penalty=1.0)
    u = torch.from_numpy(unit(z[0]))
    total = 0.0
    for i in range(6):
        p = int(positive[i])
        hardest = max((j for j in range(6) if j not in (i, p)), key=lambda j: float(u[i] @ u[j]))
        around = [MultivariateNormal(u[j], t * torch.eye(DIM).double()) for j, t in ((p, 0.4), (hardest, 0.7))]
        total += float(around[1].log_prob(u[i]) - around[0].log_prob(u[i])) / 6
    assert_equal(loss, total)


def test_temperatures_of_pairs_lie_between_the_limits_and_learn():
    net = PairTemperature(HEADS, DIM, (0.1, 2.0))
    t = net(50 * randn(HEADS, 64, DIM), randn(HEADS, 64, DIM, seed=1))
    assert t.shape == (HEADS, 64) and 0.1 <= t.min().item() < 0.5 and 1.5 < t.max().item() <= 2.0
    t.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


def test_self_distillation():
    student, teacher, center = randn(4, 3, 7), randn(2, 3, 7, seed=1), randn(7, seed=2)
    terms = []
    for g in range(2):
        for v in range(4):
            for b in range(3):
                target = torch.softmax((teacher[g, b] - center).double() / 0.05, 0)
                log_p = torch.log_softmax(student[v, b].double() / 0.1, 0)
                terms += [float(-(target * log_p).sum())] if v != g else []
    loss = self_distillation(student, teacher, center, student_temperature=0.1, teacher_temperature=0.05)
    assert len(terms) == 2 * 3 * 3
    assert_equal(loss, sum(terms) / len(terms))


def test_no_gradient_reaches_the_teacher():
    student, teacher = randn(3, 2, 4).requires_grad_(), randn(2, 2, 4).requires_grad_()
    self_distillation(student, teacher, torch.zeros(4), student_temperature=0.1, teacher_temperature=0.1).backward()
    assert teacher.grad is None and student.grad is not None and student.grad.any()


def test_sigreg_is_the_statistic_of_epps_and_pulley():
    z, directions = randn(2, 9, DIM), unit_directions(DIM, 6, seed=0, device=torch.device("cpu"))
    # The trapezoidal rule over both signs, as the paper has it
    t = np.linspace(-3, 3, 33)
    total = 0.0
    for view in z.double().numpy():
        for direction in directions.double().numpy().T:
            values = view @ direction
            empirical = np.exp(1j * t[:, None] * values).mean(1)
            error = np.abs(empirical - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)
            total += len(values) * np.trapezoid(error, t) / 12
    assert_equal(sigreg(z, directions, over_processes=False), float(total))


def test_sigreg_tells_normal_embeddings_from_others():
    directions = unit_directions(DIM, 64, seed=0, device=torch.device("cpu"))
    normal = randn(1, 2000, DIM)
    shapes = {"wide": 2 * normal, "shifted": normal + 1, "collapsed": normal * torch.tensor([1.0, 1, 1, 1, 0])}
    least = float(sigreg(normal, directions, over_processes=False))
    assert all(float(sigreg(z, directions, over_processes=False)) > 5 * least for z in shapes.values())
    assert torch.allclose(directions.norm(dim=0), torch.ones(64))
    assert not torch.equal(directions, unit_directions(DIM, 64, seed=1, device=torch.device("cpu")))


def test_invariance():
    z = randn(3, 4, DIM)
    centers = z[:2].mean(0)
    total = sum(float((z[v, b] - centers[b]).double().square().sum()) for v in range(3) for b in range(4))
    assert_equal(invariance(z, centers), total / (3 * 4 * DIM))


def test_vicreg():
    views = [0.6 * randn(6, DIM, seed=seed).double().numpy() for seed in (0, 1)]
    distance = ((views[0] - views[1]) ** 2).mean()
    hinge = covariances = 0.0
    for view in views:
        matrix = np.cov(view.T)
        hinge += sum(max(0.0, 1 - math.sqrt(matrix[j, j] + 1e-4)) for j in range(DIM)) / DIM / 2
        covariances += sum(matrix[j, k] ** 2 for j in range(DIM) for k in range(DIM) if j != k) / DIM
    first, second = (torch.from_numpy(view).float() for view in views)
    value = vicreg(first, second, similarity=25.0, variance=20.0, covariance=1.5)
    assert_equal(value, 25 * distance + 20 * hinge + 1.5 * covariances)
