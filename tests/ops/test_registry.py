"""Registry of ops: names, arguments, mixers of a net and contexts of a stage."""

from typing import Any

import pytest
import torch
from torch import nn

from ops import Place, create_op, create_ops, list_ops, parse_mixers, register_op
from ops.registry import _OPS, FIRST


@pytest.fixture
def counting_op():
    """Register an op with a context; the module that computes the context counts its calls."""

    class Total(nn.Module):
        def __init__(self, place: Place, dim: int, rate: float):
            super().__init__()
            self.place, self.dim, self.rate, self.calls = place, dim, rate, 0

        def forward(self, x):
            self.calls += 1
            return self.rate * x.sum((1, 2), keepdim=True)

    class Counting(nn.Module):
        def __init__(self, dim, num_heads, *, place=FIRST, rate=1.0):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(dim))

        @staticmethod
        def make_context(place, dim, num_heads, rate=1.0):
            return Total(place, dim, rate)

        def forward(self, x, context):
            return self.scale * (x + context)

    register_op("counting")(Counting)
    yield Counting
    del _OPS["counting"]


def test_unknown_names_are_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"no op is called 'windw'\. Did you mean 'window'\? There are: .*full"):
        create_op("windw", 8, 2)
    with pytest.raises(ValueError, match=r"'bilevel_routing' takes no 'top_k'\. Did you mean 'topk'\? It takes: n_win"):
        create_op({"name": "bilevel_routing", "top_k": 4}, 8, 2)
    with pytest.raises(ValueError, match="3 heads do not divide 8 channels"):
        create_op("full", 8, 3)
    with pytest.raises(ValueError, match="a name or a mapping with a 'name', not "):
        create_op({"topk": 4}, 8, 2)


def test_a_name_cannot_be_registered_twice():
    with pytest.raises(ValueError, match="'full' is registered twice"):
        register_op("full")(nn.Identity)


def test_list_ops_is_sorted():
    assert list_ops() == sorted(list_ops()) and {"bilevel_routing", "full", "window"} <= set(list_ops())


def test_mixers_are_one_for_all_one_for_each_stage_or_a_cycle():
    assert parse_mixers("full", (2, 1)) == [["full", "full"], ["full"]]
    local = {"name": "window", "window": 4}
    assert parse_mixers([local, ["full", local]], (1, 3)) == [[local], ["full", local, "full"]]


@pytest.mark.parametrize(
    ("mixers", "message"),
    [
        (["full"], "one for each of 2 stages, not 1"),
        (["full", []], "stage 1 must name at least one op"),
        (["full", "agnt"], "no op is called 'agnt'"),
        ([{"name": "window", "windw": 7}, "full"], "Did you mean 'window'"),
    ],
)
def test_wrong_mixers_are_refused_before_anything_is_built(mixers, message):
    with pytest.raises(ValueError, match=message):
        parse_mixers(mixers, (2, 2))


def test_ops_of_a_stage_know_their_place(counting_op):
    ops, contexts = create_ops(["window", "window", "full"], 8, 2, stage=2, stride=16)
    assert [getattr(op, "shift", None) for op in ops] == [0, 3, None]
    assert contexts == [None, None, None]


def test_equal_specs_share_a_context(counting_op):
    half = {"name": "counting", "rate": 0.5}
    _, contexts = create_ops(["counting", half, "full", "counting"], 8, 2, stage=1, stride=8)
    assert contexts[0] is contexts[3] and contexts[0] is not contexts[1] and contexts[2] is None
    assert contexts[0].place == Place(1, 0, 4, 8) and contexts[0].dim == 8 and contexts[1].rate == 0.5


def test_a_net_runs_each_context_once_a_forward_pass(counting_op):
    import timm

    import models  # noqa: F401

    torch.manual_seed(0)
    net: Any = timm.create_model("swin_nano", num_classes=2, depths=(3, 2), heads=(2, 2), mixers=["counting", "full"])
    x = torch.randn(2, 3, 16, 16)
    expected = net(x)
    context = net.stages[0].contexts[0]
    assert context.calls == 1 and len(net.stages[0].contexts) == 1 and len(net.stages[1].contexts) == 0
    net.set_grad_checkpointing()
    assert torch.allclose(net(x), expected)
    net(x).sum().backward()
    assert context.calls == 3 and net.stages[0].blocks[2].mixer.scale.grad is not None
