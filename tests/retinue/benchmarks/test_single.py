"""Tests of what is measured of one model at a time, and of energy."""

import math
import time
from typing import Any

import pytest
import torch

from retinue.benchmarks import machine, model_steps, models, single
from retinue.benchmarks.model_steps import Parts, Setting, make_parts, make_step

SETTING = Setting(image_size=32, batch_size=2, device="cpu", dtype="float32", channels_last=False)
NET = {"name": "test_resnet"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(single, "MAX_CALLS", 20)
    monkeypatch.setattr(single, "CALLS_SECONDS", 0.2)
    # Collecting garbage takes longer than these small models.
    monkeypatch.setattr(single, "free_memory", lambda: None)


def makes_batches_of_at_most(largest, tried, error):
    """Return a maker of steps that sleep for a millisecond per image, and fail if the batch is too large."""

    def make(setting):
        def step():
            tried.append(setting.batch_size)
            if setting.batch_size > largest:
                raise error
            time.sleep(0.001 * setting.batch_size)

        return step

    return make


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_a_batch_that_does_not_fit_is_halved_until_it_fits(error, capsys):
    tried = []
    make = makes_batches_of_at_most(10, tried, error)
    found = list(single.throughput("net", make, SETTING, [64, 2, 40, 4], rounds=1))
    assert [setting.batch_size for setting, _ in found] == [2, 4, 10]
    # 40, 20 and 10 are tried; 64 is not, since 40 did not fit.
    assert list(dict.fromkeys(tried)) == [2, 4, 40, 20, 10]
    # A load on the machine makes a sleep longer, never shorter.
    assert all(figures["timing"].median >= 0.001 * setting.batch_size for setting, figures in found)
    assert capsys.readouterr().out.splitlines() == [
        "net: a batch of 40 does not fit in memory", "net: a batch of 20 does not fit in memory",
    ]  # fmt: skip


def test_halving_ends_at_a_size_that_was_measured_and_another_fault_is_not_halved(capsys):
    tried = []
    make = makes_batches_of_at_most(4, tried, MemoryError())
    assert [setting.batch_size for setting, _ in single.throughput("net", make, SETTING, [4, 8], 1)] == [4]
    assert [size.batch_size for size, _ in single.throughput("net", make, SETTING, [8], 1)] == [4]
    make = makes_batches_of_at_most(4, tried, ValueError("no such batch"))
    assert [size.batch_size for size, _ in single.throughput("net", make, SETTING, [4, 8, 1], 1)] == [1, 4]
    assert "a batch of 8 is left out: no such batch" in capsys.readouterr().out


def test_the_rows_of_one_model():
    rows: list[dict[str, Any]] = single.measure_alone(  # pyright: ignore[reportAssignmentType]
        {"net": NET}, SETTING, batch_sizes=[2, 4], latency=True, parts=True, energy=True, rounds=1
    )
    assert [(row["mode"], row["batch_size"]) for row in rows] == [
        ("throughput", 2), ("throughput", 4), ("training throughput", 2), ("training throughput", 4), ("latency", 1),
        ("forward", 2), ("backward", 2), ("optimizer", 2),
    ]  # fmt: skip
    assert all(row["images_per_s"] == pytest.approx(1000 * row["batch_size"] / row["median_ms"]) for row in rows)
    latency = rows[4]
    assert latency["shape"] == "1x3x32x32" and latency["p99_ms"] >= latency["p80_ms"] >= latency["median_ms"]
    assert all(row["joules_per_image"] is None for row in rows[:4])
    assert all("cores" in row["machine"] and "main memory" in row["machine"] for row in rows)
    assert rows[0]["params_m"] == pytest.approx(models.complexities({"net": NET}, 32)["net"][0] / 1e6)


def test_the_parts_together_are_the_training_step(monkeypatch):
    """The parameters after the three parts must equal those after a whole step."""
    nets = []
    build = model_steps.build
    monkeypatch.setattr(model_steps, "build", lambda *args: nets.append(build(*args)) or nets[-1])
    parts = make_parts(NET, SETTING)
    before = [parameter.detach().clone() for parameter in nets[0].parameters()]
    loss = parts.forward()
    assert all(parameter.grad is None for parameter in nets[0].parameters())
    parts.backward(loss)
    assert all(parameter.grad is not None for parameter in nets[0].parameters())
    assert all(map(torch.equal, before, nets[0].parameters()))
    parts.update()
    # Only the last weights of a residual branch that begins at zero have a gradient.
    assert not all(map(torch.equal, before, nets[0].parameters()))
    assert all(parameter.grad is None for parameter in nets[0].parameters())
    make_step(NET, SETTING, train=True)()
    for ours, step in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(ours, step)


def test_the_time_of_a_part_is_its_own(monkeypatch):
    waits = {"forward": 0.002, "backward": 0.02, "optimizer": 0.006}
    parts = sleeping_parts(waits)
    monkeypatch.setattr(single, "make_parts", lambda *args: parts)
    timings = single.time_parts(NET, SETTING, "eager", "")
    # A load on the machine makes a sleep longer, never shorter.
    assert list(timings) == list(waits)
    assert all(min(timings[part].seconds) >= wait for part, wait in waits.items())
    assert min(timings["forward"].seconds) < 0.02


def sleeping_parts(waits):
    return Parts(
        lambda: time.sleep(waits["forward"]),  # pyright: ignore[reportArgumentType]
        lambda loss: time.sleep(waits["backward"]),
        lambda: time.sleep(waits["optimizer"]),
    )


def test_wildcards_take_our_nets_and_timms():
    names = models.expand(["resnet18", "biformer_*", "resnet1?t"])
    assert names[0] == "resnet18" and names.count("resnet18") == 1
    assert {"biformer_tiny", "resnet10t", "resnet14t"} <= set(names) and "resnet152" not in names
    with pytest.raises(ValueError, match=r"no model matches biformer_tinny\*\. Did you mean 'biformer_tiny'"):
        models.expand(["biformer_tinny*"])


def test_a_net_that_a_wildcard_gave_may_refuse_the_image_size(capsys):
    nets = {"good": NET, "bad": {"name": "test_resnet", "window": 7}}
    assert list(models.complexities(nets, 32, may_fail=["bad"])) == ["good"]
    assert capsys.readouterr().out.startswith("bad is left out: ")
    with pytest.raises(ValueError, match="window"):
        models.complexities(nets, 32)


def test_many_models_are_timed_in_groups_each_with_the_baseline(monkeypatch):
    monkeypatch.setattr(models, "MAX_IN_TURN", 2)
    assert list(models.groups(list("abcde"), "d")) == [["a", "b", "d"], ["c", "d", "e"]]
    assert list(models.groups(list("abc"), None)) == [["a", "b"], ["c"]]
    assert list(models.groups(["a"], "a")) == [["a"]]
    measured = []

    def measure(makers, *args):
        measured.append(list(makers))
        seconds = {"a": 1.0, "b": 2.0, "c": 4.0}
        return {name: models.Measured(models.Timing((seconds[name],)), 1.0, 1.0) for name in makers}

    monkeypatch.setattr(models, "measure", measure)
    monkeypatch.setattr(models, "MAX_IN_TURN", 1)
    rows = models.benchmark(dict.fromkeys("abc", NET), SETTING, train=False, against="b")
    assert measured == [["a", "b"], ["b", "c"]]
    assert [(row["what"], row["ratio"]) for row in rows] == [("a", 2), ("b", 1), ("c", 0.5)]


def test_energy_is_the_integral_of_the_power():
    # 100 W until second 2, then a rise to 300 W at second 4: 50 J, 100 J and half of the rise (125 J).
    readings = [(1.0, 100.0), (2.0, 100.0), (4.0, 300.0)]
    assert machine.integrate(readings, 1.5, 3.0) == pytest.approx(50 + 150)
    # Outside the readings the power is that of the nearest one.
    assert machine.integrate(readings, 0.0, 5.0) == pytest.approx(100 + 100 + 400 + 300)


def test_a_call_takes_its_share_of_the_energy():
    calls = []

    def call():
        calls.append(time.perf_counter())
        time.sleep(0.01)

    joules = machine.joules_per_call(call, lambda: 200.0, seconds=0.3, settling_seconds=0.05)
    # 200 W for one hundredth of a second, and what waking up takes on a busy machine.
    assert 2 <= joules < 6
    assert calls[-1] - calls[0] > 0.3
    assert machine.power_meter("cpu") is None and not math.isnan(joules)
