"""Tests of the inputs and the check of the benchmark of deformable attention."""

import pytest

from retinue.benchmarks import heads


def test_a_step_that_computes_something_else_is_not_timed():
    steps = {name: make(1, (16, 16), 3, "cpu") for name, make in heads.candidates("cpu").items()}
    heads.check(steps)
    wrong = {**steps, heads.OURS: lambda: tuple(2 * t for t in steps[heads.PLAIN_MMCV]())}
    with pytest.raises(AssertionError):
        heads.check(wrong)


def test_every_token_is_a_query_of_the_encoder():
    value, shapes, starts, locations, _ = heads.make_inputs(2, (64, 70), None, "cpu")
    assert shapes.tolist() == [[8, 9], [4, 5], [2, 3], [1, 2]] and starts.tolist() == [0, 72, 92, 98]
    assert value.shape[1] == locations.shape[1] == 100
