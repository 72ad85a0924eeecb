"""Tests of timing callables in turn, of peak memory, and of the choice of a device."""

from functools import partial

import pytest
import torch

from retinue.benchmarks import timing


def test_callables_are_timed_in_turn_with_the_order_reversed_every_second_round():
    calls = []
    timings = timing.interleave({name: partial(calls.append, name) for name in "abc"}, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert [len(result.seconds) for result in timings.values()] == [3, 3, 3]


def test_a_quick_callable_is_called_until_the_minimum_time_is_reached():
    matrix = torch.ones(16, 16)
    products = []
    timings = timing.interleave(
        {"product": lambda: products.append(matrix @ matrix)}, rounds=2, warmup=1, min_seconds=0.01
    )
    assert len(products) > 100
    # Seconds of a call, not of a round.
    assert timings["product"].median < 1e-3


def test_ratios_are_taken_round_by_round():
    slow, quick = timing.Timing((2.0, 40.0, 6.0)), timing.Timing((1.0, 10.0, 3.0))
    assert quick.speedup(slow) == 2.0
    assert (slow.median, slow.p20, slow.p80) == (6.0, pytest.approx(3.6), pytest.approx(26.4))


def hold(megabytes: int):
    """Hold `megabytes` MB, and return a function that allocates half as much again."""
    held = torch.ones(megabytes * 250_000)
    return lambda: held[: megabytes * 125_000] + 1


def test_peak_memory_on_the_cpu_is_the_growth_of_a_process():
    assert timing.peak_memory_mb(partial(hold, 200), "cpu") == pytest.approx(300, abs=30)
    assert timing.peak_memory_mb(partial(hold, 60), "cpu") == pytest.approx(90, abs=30)


def test_a_missing_device_is_an_error():
    with pytest.raises(ValueError, match=r"one of the \d+ GPUs \(cuda:N\), not 'cuda:99'"):
        timing.pick_device("cuda:99")


@pytest.mark.parametrize("name, number", [("auto", 0), ("cuda:1", 1)])
def test_the_chosen_gpu_becomes_the_current_device(monkeypatch, name, number):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert timing.pick_device(name).type == "cuda"
    assert current == [number]
