"""Nets of equal budgets."""

import pytest

from models import create_model
from retinue.results.budgets import Setting, cost, match
from retinue.results.search import to_overrides

SWIN = {"name": "swin_nano", "mixers": "window", "args": {}}
MACS = Setting("macs", (32, 32), 3)


@pytest.mark.parametrize(
    ("op", "quantity"),
    [
        ("full", "macs"),
        ("lora_window", "params"),
        pytest.param("strip_self", "macs", marks=pytest.mark.slow),
        pytest.param("strip_self", "params", marks=pytest.mark.slow),
    ],
)
def test_the_width_brings_a_net_to_the_budget(quantity, op):
    setting = Setting(quantity, (32, 32), 3)
    budget = cost(SWIN, setting)
    arguments = match({**SWIN, "mixers": op}, setting, budget, "width")
    matched = cost({**SWIN, "mixers": op, "args": arguments}, setting)
    assert abs(matched / budget - 1) < 0.07
    # Neither neighbour is closer.
    for step in (-2, 2):
        other = cost({**SWIN, "mixers": op, "args": {"dim": arguments["dim"] + step}}, setting)
        assert abs(other - budget) > 0.9 * abs(matched - budget)


def test_a_net_that_meets_the_budget_stays_as_it_is():
    assert match(SWIN, MACS, cost(SWIN, MACS), "width") == {"dim": 32}
    assert match(SWIN, MACS, cost(SWIN, MACS), "depth") == {"depths": [2, 2, 2, 2]}


def test_heads_divide_the_widths_of_a_pyramid_whose_stages_are_listed():
    model = {"name": "pvt_tiny", "mixers": "full", "args": {}}
    setting = Setting("macs", (224, 224), 3)
    budget = cost({"name": "pvt_tiny", "args": {}}, setting)
    [(name, dims)] = match(model, setting, budget, "width").items()
    assert name == "dims" and [dim // dims[0] for dim in dims] == [1, 2, 5, 8]
    assert to_overrides({f"++model.args.{name}": dims}) == [f"++model.args.dims=[{','.join(map(str, dims))}]"]
    assert abs(cost({**model, "args": {name: dims}}, setting) / budget - 1) < 0.05


def test_the_deepest_stage_is_changed():
    model = {"name": "swin_tiny", "mixers": "halo", "args": {}}
    setting = Setting("macs", (224, 224), 3)
    budget = cost({**model, "mixers": "window"}, setting)
    arguments = match(model, setting, budget, "depth")
    assert arguments == {"depths": [2, 2, 4, 2]}
    assert sum(p.numel() for p in create_model({**model, "args": arguments}, 10, 3, 224).parameters()) > 0


def test_a_net_without_a_width_is_refused_in_one_line():
    with pytest.raises(ValueError, match="ResNet has no argument for its width: it takes"):
        match({"name": "resnet18", "args": {}}, Setting("macs", (64, 64), 3), 10**9, "width")
