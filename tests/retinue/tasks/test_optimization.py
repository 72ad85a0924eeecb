"""Tests of the optimiser and the learning-rate schedules of recipes."""

import math

import pytest
import torch
from torch import nn

from retinue.tasks.optimization import check_optimizer, create_optimizer, create_schedule, total_epochs
from tests.ops.kernels.ahead_of_time import stand_in_gpu

STEPS_PER_EPOCH = 10


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(2, 2), nn.Linear(2, 2)


def recipe(schedule, epochs: int | None = 12, steps=None, **optimizer):
    settings = {"name": "sgd", "lr": 1.0, "lr_batch_size": 8, "weight_decay": 0.1, "momentum": 0.9, **optimizer}
    common = {"warmup_epochs": 0, "warmup_lr": 0.0, "min_lr": 0.0}
    return {
        "epochs": epochs, "steps": steps, "batch_size": 8, "optimizer": settings, "schedule": common | schedule,
    }  # fmt: skip


def learning_rates(settings, steps):
    """Return the learning rate of each optimiser step; the schedule sets the next rate after a step, as in a task."""
    optimizer = create_optimizer(Net(), settings)
    schedule = create_schedule(optimizer, settings, STEPS_PER_EPOCH)
    rates = []
    for step in range(steps):
        rates.append(max(group["lr"] for group in optimizer.param_groups))
        schedule.step_update(step + 1)
    return rates


def test_the_rate_falls_after_the_epochs_of_the_milestones():
    rates = learning_rates(recipe({"kind": "step", "milestones": [8, 11], "gamma": 0.1}), 120)
    assert rates[:80] == [1.0] * 80
    assert rates[80:110] == pytest.approx([0.1] * 30)
    assert rates[110:] == pytest.approx([0.01] * 10)


def test_milestones_do_not_move_with_the_warm_up():
    settings = recipe({"kind": "step", "milestones": [8, 11], "gamma": 0.1, "warmup_steps": 5, "warmup_lr": 0.001})
    rates = learning_rates(settings, 120)
    assert rates[:5] == pytest.approx([0.001 + 0.999 * i / 5 for i in range(5)])
    assert rates[5:80] == [1.0] * 75 and rates[80] == pytest.approx(0.1)


def test_a_long_warm_up_is_warned_of_with_a_value_that_the_schema_takes(caplog):
    settings = recipe({"kind": "cosine", "warmup_steps": 5000, "warmup_lr": 0.001, "min_lr": 0.0}, epochs=123)
    learning_rates(settings, 1)
    assert "takes 1230 of the run's 1230 steps" in caplog.text and "warmup_steps=123 is a tenth" in caplog.text


def test_poly_follows_its_formula():
    rates = learning_rates(recipe({"kind": "poly", "power": 0.9, "min_lr": 0.01}, epochs=4), 40)
    assert rates == pytest.approx([0.01 + 0.99 * (1 - i / 40) ** 0.9 for i in range(40)])


@pytest.mark.parametrize(
    ("kind", "share"),
    [("cosine", lambda t: 0.5 * (1 + math.cos(math.pi * t))), ("poly", lambda t: (1 - t) ** 0.9)],
)
def test_the_rate_is_highest_at_the_end_of_the_warm_up_if_it_falls_from_there(kind, share):
    schedule = {"kind": kind, "power": 0.9, "warmup_epochs": 3, "min_lr": 0.01, "after_warmup": True}
    falling = [0.01 + 0.99 * share(i / 90) for i in range(90)]
    assert learning_rates(recipe(schedule), 120) == pytest.approx([i / 30 for i in range(30)] + falling)
    # Without the key the curve begins at the first step, as in timm.
    assert learning_rates(recipe(schedule | {"after_warmup": None}), 31)[30] == pytest.approx(
        0.01 + 0.99 * share(30 / 120)
    )


def test_steps_are_rounded_up_to_whole_epochs():
    settings = recipe({"kind": "poly", "power": 1.0}, epochs=None, steps=95)
    assert total_epochs(settings, STEPS_PER_EPOCH) == 10
    # The rate falls over all 100 steps.
    assert learning_rates(settings, 100)[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("kind", ["cosine", "step", "poly"])
def test_backbone_factor_scales_the_rates_of_the_backbone(kind):
    settings = recipe({"kind": kind, "milestones": [8], "gamma": 0.1, "power": 1.0}, backbone_factor=0.1)
    net = Net()
    optimizer = create_optimizer(net, settings)
    schedule = create_schedule(optimizer, settings, STEPS_PER_EPOCH)
    schedule.step_update(85)
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    for name in ("weight", "bias"):
        slow, fast = rate[id(getattr(net.backbone, name))], rate[id(getattr(net.head, name))]
        assert slow[0] == pytest.approx(0.1 * fast[0]) and slow[1] == fast[1] == (0.1 if name == "weight" else 0.0)
    assert len(rate) == 4


def test_backbone_factor_holds_for_the_first_step():
    settings = recipe({"kind": "poly", "power": 1.0}, backbone_factor=0.1, weight_decay=0.0)
    net = Net()
    optimizer = create_optimizer(net, settings)
    create_schedule(optimizer, settings, STEPS_PER_EPOCH)
    before = [p.detach().clone() for p in (net.backbone.weight, net.head.weight)]
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = (p.detach() for p in (net.backbone.weight, net.head.weight))
    slow, fast = (float((old - new).mean()) for old, new in zip(before, after, strict=True))
    assert slow == pytest.approx(0.1 * fast) and fast > 0


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ({"kind": "linear"}, "recipe.schedule.kind must be cosine, step, poly, plateau, not 'linear'"),
        (
            {"kind": "step", "milestones": [8], "after_warmup": True},
            "after_warmup is for kind=cosine and poly, not step",
        ),
        ({"kind": "step"}, r"recipe.schedule.kind=step needs recipe.schedule.milestones, such as \[8, 11\]"),
    ],
)
def test_wrong_schedules_are_refused(schedule, says):
    with pytest.raises(ValueError, match=says):
        check_optimizer(recipe(schedule))


@pytest.mark.parametrize(("name", "fused"), [("adamw", True), ("sgd", True), ("lamb", None), ("lookahead_adamw", None)])
def test_optimisers_with_a_fused_form_are_fused_on_a_gpu(name, fused):
    settings = recipe({"kind": "cosine"}, name=name)
    with stand_in_gpu():
        with torch.device("cuda"):
            net = Net()
        optimizer = create_optimizer(net, settings)
    assert {group.get("fused") for group in optimizer.param_groups} == {fused}
    assert not vars(optimizer)["_step_supports_amp_scaling"]
    assert not any(group.get("fused") for group in create_optimizer(Net(), settings).param_groups)
