"""Test of the command that measures the trainer."""

import csv

import pytest

from scripts import benchmark_trainer


def test_the_command_writes_a_row_for_each_side(tmp_path, capsys):
    arguments = ["model=resnet10t", "image_size=32", "batch_size=4", "steps=2", "rounds=3", "device=cpu", "threads=1"]
    benchmark_trainer.main([*arguments, f"out={tmp_path / 'rows.csv'}"])
    with open(tmp_path / "rows.csv", newline="") as file:
        trainer, bare = csv.DictReader(file)
    assert (trainer["what"], trainer["against"], bare["what"]) == ("trainer", "bare loop", "bare loop")
    assert float(bare["ratio"]) == 1
    assert float(trainer["ratio"]) > 0
    assert float(trainer["steps_per_s"]) == pytest.approx(1000 / float(trainer["median_ms"]))
    assert "bare loop" in capsys.readouterr().out
