"""Tests of what is measured of attention, and of the rows."""

from dataclasses import replace

import pytest
import torch

from ops.functional import routed_attention
from retinue.benchmarks import ops
from retinue.benchmarks.formulations import FORMULATIONS, Formulation
from retinue.benchmarks.ops import Figures
from retinue.benchmarks.primitives import PRIMITIVES
from retinue.benchmarks.timing import Timing
from tests.retinue.benchmarks.examples import LAYERS, runnable, wrong_routed_attention

SETTING = ops.MeasuringSetting(torch.device("cpu"), "float32", 2)


def test_wrong_attention_of_ours_is_not_measured(monkeypatch):
    monkeypatch.setitem(FORMULATIONS["routed_attention"], "routed_attention", Formulation(wrong_routed_attention))
    message = r"routed_attention errs \S+ times as much as plain PyTorch in the .*, more than 2: 2 x 14 x 14 x 32"
    with pytest.raises(ValueError, match=message):
        ops.measure_layer(LAYERS[0], 2, SETTING, compiling=False)


def test_a_wrong_gradient_of_ours_is_not_measured(monkeypatch):
    def exact_forward(qkv, *args):
        return routed_attention(qkv + (qkv * 1e-3 - (qkv * 1e-3).detach()), *args)

    monkeypatch.setitem(FORMULATIONS["routed_attention"], "routed_attention", Formulation(exact_forward))
    with pytest.raises(ValueError, match="in the gradient of q, k and v"):
        ops.measure_layer(LAYERS[0], 2, SETTING, compiling=False)


def test_a_peer_that_is_wrong_or_fails_is_left_out(monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("the first line\nand more")

    monkeypatch.setitem(FORMULATIONS["routed_attention"], "masked SDPA", Formulation(wrong_routed_attention))
    monkeypatch.setitem(FORMULATIONS["routed_attention"], "FlexAttention", Formulation(fail, external=True))
    measured = ops.measure_layer(LAYERS[0], 1, SETTING, compiling=False)
    assert {name for name, _ in measured} == {"routed_attention", "gather, matmul, softmax", "index_select + SDPA"}
    printed = capsys.readouterr().out
    assert "masked SDPA is left out" in printed and "FlexAttention is left out" in printed
    assert "and more" not in printed


def test_ratios_are_relative_to_the_authors_formulation():
    measured = ops.measure_layer(LAYERS[0], 1, SETTING, compiling=False)
    rows = ops.make_rows(measured, SETTING, "shape", "series", 1, 56**2)
    names = runnable(LAYERS[0])
    assert [(row["what"], row["direction"]) for row in rows] == [
        (name, direction) for direction in ("forward", "forward + backward") for name in names
    ]
    assert all(row["against"] == (None if row["what"] == names[1] else names[1]) for row in rows)
    assert isinstance(rows[0]["ratio"], float) and rows[0]["error"] == measured[names[0], False].error


def test_sums_count_layers_and_leave_out_what_did_not_run_everywhere():
    def figures(*seconds, peak_mb=None):
        return Figures(Timing(seconds), peak_mb, 0.5, 1.0)

    ours, peer = ("ours", False), ("peer", False)
    first = {ours: figures(1.0, 2.0, peak_mb=7.0), peer: figures(5.0, 5.0)}
    second = {ours: figures(10.0, 20.0, peak_mb=3.0)}
    [(key, total)] = ops.total([(LAYERS[0], first), (replace(LAYERS[0], count=2), second)]).items()
    assert key == ours and total == Figures(Timing((23.0, 46.0)), 7.0, 0.5, 5.0)


def test_what_is_not_named_is_chosen_to_fit_the_machine():
    plan = ops.make_plan(None, None, None, None, cuda=False)
    assert plan.nets == ["biformer_tiny"] and plan.batches == {(224, 224): 1} and not plan.compile_ops
    assert plan.primitives == list(PRIMITIVES) and "bilevel_routing" in plan.ops
    plan = ops.make_plan(["window"], None, [(224, 224), (800, 1333)], None, cuda=True)
    assert plan.nets == plan.primitives == [] and plan.ops == ["window"] and plan.compile_ops
    assert plan.batches == {(224, 224): 128, (800, 1333): 4}
    plan = ops.make_plan(None, ["swin_tiny"], [(64, 64)], 3, cuda=True)
    assert plan.nets == ["swin_tiny"] and plan.ops == [] and plan.net_batch == 3 and plan.batches == {(64, 64): 3}
    assert ops.make_plan(None, ["swin_tiny"], None, None, cuda=True, tune=True).primitives == list(PRIMITIVES)
