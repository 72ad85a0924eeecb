import csv

import pytest
import torch

from scripts import benchmark_trainer

CPU = torch.device("cpu")


def test_both_sides_do_the_same_work():
    net, bare = benchmark_trainer.train_both("resnet10t", 32, 4, CPU, steps=2, rounds=3)
    trained, bare_trained = net.state_dict(), bare.net.state_dict()
    assert trained["bn1.num_batches_tracked"] == 6
    for name, value in bare_trained.items():
        torch.testing.assert_close(trained[name], value, msg=name)
    assert len(bare.trainer_seconds) == len(bare.bare_seconds) == 3


def test_rows_and_csv(tmp_path, capsys):
    arguments = ["--model", "resnet10t", "--img-size", "32", "--batch-size", "4", "--steps", "2", "--rounds", "3"]
    benchmark_trainer.main([*arguments, "--device", "cpu", "--threads", "1", "--csv", str(tmp_path / "rows.csv")])
    with open(tmp_path / "rows.csv", newline="") as file:
        ours, bare = csv.DictReader(file)
    assert (ours["what"], ours["against"], bare["what"]) == ("trainer", "bare loop", "bare loop")
    assert float(bare["ratio"]) == 1
    assert 0.3 < float(ours["ratio"]) < 3
    assert float(ours["steps_per_s"]) == pytest.approx(1000 / float(ours["median_ms"]))
    assert "bare loop" in capsys.readouterr().out
