"""Plateau schedule, adaptive clipping, square-root rate and Muon's choice of tensors, each against its definition."""

import math

import pytest
import torch
from torch import Tensor, nn

from retinue.tasks.optimization import (
    batch_scale,
    clip_adaptively,
    create_optimizer,
    create_schedule,
    hidden_matrices,
)
from retinue.tasks.plateau import PlateauScheduler
from tests.retinue.tasks.test_optimization import Net, recipe

FIGURES = [0.1, 0.2, 0.2, 0.15, 0.3, 0.3, 0.3, 0.3, 0.29, 0.28, 0.31, 0.1, 0.1, 0.1, 0.1, 0.1]


class Classifier(nn.Module):
    """Patch embedding, position table, one block and a classifier."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"classifier": "head"}
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.positions = nn.Parameter(torch.randn(16, 8))
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 12)
        self.mix = nn.Conv2d(12, 12, 3, groups=12)
        self.point = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 5)


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def plateau():
    schedule = {"kind": "plateau", "gamma": 0.5, "patience": 1, "warmup_steps": 4, "min_lr": 0.1}
    settings = recipe(schedule, backbone_factor=0.5)
    optimizer = create_optimizer(Net(), settings)
    schedule = create_schedule(optimizer, settings, 2)
    assert isinstance(schedule, PlateauScheduler)
    return optimizer, schedule


def rates(optimizer):
    return sorted({group["lr"] for group in optimizer.param_groups})


def test_the_rate_falls_at_a_plateau_and_a_resumed_schedule_goes_on():
    optimizer, schedule = plateau()
    expected, best, bad, step = 1.0, -math.inf, 0, 0
    assert rates(optimizer) == [0.0]
    for epoch, figure in enumerate(FIGURES):
        for _ in range(2):
            step += 1
            schedule.step_update(step)
            expected = step / 4 if step <= 4 else expected
            assert rates(optimizer) == pytest.approx([0.5 * expected, expected])
        schedule.observe(figure, step)
        if step >= 4:
            best, bad = (figure, 0) if figure > best * 1.0001 else (best, bad + 1)
            if bad > 1:
                expected, bad = max(0.1, 0.5 * expected), 0
        assert rates(optimizer) == pytest.approx([0.5 * expected, expected])
        if epoch % 3 == 0:
            states = optimizer.state_dict(), schedule.state_dict()
            optimizer, schedule = plateau()
            optimizer.load_state_dict(states[0])
            schedule.load_state_dict(states[1])
    assert expected == 0.1


def test_adaptive_clipping_follows_its_definition_and_leaves_the_classifier():
    torch.manual_seed(0)
    net = Classifier()
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    net.fc.weight.data[0] = 0
    gradient(net.fc.weight)[1] *= 1e-4
    before = {name: gradient(parameter).double() for name, parameter in net.named_parameters()}
    clip_adaptively(net, 0.02)
    for name, parameter in net.named_parameters():
        expected = before[name].clone()
        units = [()] if parameter.ndim == 1 else [(i,) for i in range(len(parameter))]
        for unit in units if not name.startswith("head") else []:
            limit = 0.02 * max(float(parameter.detach().double()[unit].norm()), 1e-3)
            norm = float(expected[unit].norm())
            if norm > limit:
                expected[unit] = expected[unit] * (limit / norm)
        assert torch.allclose(gradient(parameter).double(), expected, rtol=1e-5, atol=0), name
    assert torch.equal(gradient(net.head.weight).double(), before["head.weight"])
    assert not torch.equal(gradient(net.embed.weight).double(), before["embed.weight"])


@pytest.mark.parametrize(("scaling", "factor"), [(None, 0.25), ("sqrt", 0.5)])
def test_rates_scale_with_the_batch_or_its_square_root(scaling, factor):
    settings = recipe({"kind": "cosine"}, lr_batch_size=32, lr_scaling=scaling)
    assert batch_scale(settings) == factor
    assert {group["lr"] for group in create_optimizer(Net(), settings).param_groups} == {factor}


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    torch.manual_seed(0)
    net, twin = Classifier(), Classifier()
    twin.load_state_dict(net.state_dict())
    assert hidden_matrices(net) == {"fc.weight", "point.weight"}
    settings = recipe({"kind": "cosine"}, name="muon", lr=0.01, weight_decay=0.0, momentum=None)
    optimizer = create_optimizer(net, settings)
    adamw = torch.optim.AdamW(twin.parameters(), 0.01, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.0)
    for parameter, copy in zip(net.parameters(), twin.parameters(), strict=True):
        parameter.grad = torch.randn_like(parameter)
        copy.grad = gradient(parameter).clone()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    optimizer.step()
    adamw.step()
    after = dict(twin.named_parameters())
    for name, parameter in net.named_parameters():
        change = (parameter.detach() - before[name]).flatten(1 if parameter.ndim > 1 else 0)
        if name in ("fc.weight", "point.weight"):
            # The step has the singular vectors of the gradient and singular values near 1, scaled as AdamW's steps are.
            u, _, v = torch.linalg.svd(gradient(parameter).flatten(1), full_matrices=False)
            values = torch.diagonal(u.T @ (-change) @ v.T) / (0.01 * 0.2 * math.sqrt(max(change.shape)))
            assert values.min() > 0.5 and values.max() < 1.3, (name, values)
        else:
            torch.testing.assert_close(parameter, after[name], rtol=1e-5, atol=1e-7)


def test_muon_needs_a_hidden_matrix():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match="the net trains none"):
        create_optimizer(net, recipe({"kind": "cosine"}, name="muon", momentum=None))
