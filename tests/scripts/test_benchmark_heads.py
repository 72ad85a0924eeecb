import csv

import pytest
import torch

from scripts import benchmark_heads


def test_both_sides_are_timed_on_the_same_attention(tmp_path):
    target = tmp_path / "rows.csv"
    args = ["--device", "cpu", "--image-size", "64", "70", "--rounds", "2", "--threads", "1", "--csv", str(target)]
    benchmark_heads.main(args)
    rows = list(csv.DictReader(target.open()))
    assert [(row["what"], row["part"]) for row in rows] == [
        (name, part) for part in ("encoder", "decoder") for name in ("stand-in", "mmcv's plain PyTorch")
    ]
    assert all(0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]) for row in rows)
    assert [float(row["ratio"]) for row in rows[1::2]] == [1, 1]  # the plain one against itself


def test_a_step_that_computes_something_else_is_not_timed():
    steps = {name: make(1, (16, 16), 3, "cpu") for name, make in benchmark_heads.candidates("cpu").items()}
    benchmark_heads.check(steps)
    wrong = {**steps, benchmark_heads.STAND_IN: lambda: tuple(2 * t for t in steps["mmcv's plain PyTorch"]())}
    with pytest.raises(AssertionError):
        benchmark_heads.check(wrong)


def test_the_encoder_asks_from_each_token():
    value, shapes, starts, locations, _ = benchmark_heads.inputs(2, (64, 70), None, "cpu")
    assert shapes.tolist() == [[8, 9], [4, 5], [2, 3], [1, 2]] and starts.tolist() == [0, 72, 92, 98]
    assert value.shape[1] == locations.shape[1] == 100 and torch.is_tensor(value)
