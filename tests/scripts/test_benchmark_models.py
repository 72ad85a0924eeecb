import csv
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from retinue.benchmarks import timing as benchmarking
from scripts import benchmark_models

SCRIPT = Path(benchmark_models.__file__)


def test_callables_are_timed_in_turn_with_the_order_reversed_every_second_round():
    calls = []
    timings = benchmarking.interleave({n: partial(calls.append, n) for n in "abc"}, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert [len(t.seconds) for t in timings.values()] == [3, 3, 3]


def test_quick_callables_fill_the_least_time():
    matrix = torch.ones(16, 16)
    seen = []
    timings = benchmarking.interleave({"m": lambda: seen.append(matrix @ matrix)}, rounds=2, warmup=1, min_seconds=0.01)
    assert len(seen) > 100
    assert timings["m"].median < 1e-3  # seconds a call, not a round


def test_ratios_are_taken_round_by_round():
    slow, quick = benchmarking.Timing((2.0, 40.0, 6.0)), benchmarking.Timing((1.0, 10.0, 3.0))
    assert quick.speedup(slow) == 2.0
    assert (slow.median, slow.p20, slow.p80) == (6.0, pytest.approx(3.6), pytest.approx(26.4))


def hold(megabytes: int):
    """Holds that many MB, and half of them again while it is called."""
    held = torch.ones(megabytes * 250_000)
    return lambda: held[: megabytes * 125_000] + 1


def test_peak_memory_on_the_cpu_is_what_a_process_grows_by():
    assert benchmarking.peak_memory_mb(partial(hold, 200), "cpu") == pytest.approx(300, abs=30)
    assert benchmarking.peak_memory_mb(partial(hold, 60), "cpu") == pytest.approx(90, abs=30)


def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"one of the \d+ GPUs \(cuda:N\), not 'cuda:99'"):
        benchmarking.pick_device("cuda:99")


@pytest.mark.parametrize("name, number", [("auto", 0), ("cuda:1", 1)])
def test_the_gpu_that_is_picked_is_the_one_that_is_waited_for(monkeypatch, name, number):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert benchmarking.pick_device(name).type == "cuda"
    assert current == [number]


def test_models_are_compared_in_rows_with_csv_and_plot(tmp_path, capsys):
    arguments = ["--models", "resnet18", "resnet10t", "--img-size", "64", "--batch-size", "2", "--rounds", "2"]
    arguments += ["--threads", "1", "--device", "cpu", "--against", "resnet18"]
    benchmark_models.main([*arguments, "--csv", str(tmp_path / "rows.csv"), "--plot", str(tmp_path / "plot.png")])
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["what"], row["mode"]) for row in rows] == [
        ("resnet18", "inference"), ("resnet10t", "inference"), ("resnet18", "training"), ("resnet10t", "training"),
    ]  # fmt: skip
    big, small, trained, _ = rows
    assert list(big)[:5] == ["what", "against", "ratio", "shape", "dtype"]
    assert float(big["params_m"]) == pytest.approx(11.689512)
    assert float(big["macs_g"]) == pytest.approx(0.1486, rel=0.02)  # 1.82 G at 224 px
    assert float(big["ratio"]) == 1
    assert float(small["ratio"]) > 0  # how quick one is depends on what else runs
    assert min(float(row[name]) for row in rows for name in ("median_ms", "p20_ms", "p80_ms")) > 0
    # AdamW holds weights, gradients and two moments: four times the 47 MB of weights.
    assert float(trained["peak_mb"]) > 4 * 46.8
    assert float(trained["peak_mb"]) > float(big["peak_mb"]) > 46.8
    assert float(big["images_per_s"]) == pytest.approx(2000 / float(big["median_ms"]))
    assert "torch" in big["versions"]
    assert "resnet10t" in capsys.readouterr().out
    assert len(np.unique(np.asarray(Image.open(tmp_path / "plot.png").convert("L")))) > 10


def test_the_plot_follows_the_rows(tmp_path):
    row = {"what": "net", "mode": "inference", "macs_g": 1.0, "images_per_s": 10.0, "params_m": 5.0}
    row |= {"device": "cpu", "dtype": "float32", "shape": "1"}
    benchmark_models.plot(tmp_path / "one.png", [row, row | {"images_per_s": 20.0}])
    benchmark_models.plot(tmp_path / "two.png", [row, row | {"images_per_s": 90.0, "macs_g": 4.0}])
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()


def test_an_unknown_model_is_one_line_with_the_nearest_and_code_2():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--models", "resnet_18"],
        capture_output=True,
        text=True,
        cwd=SCRIPT.parents[1],
    )
    assert done.returncode == 2
    assert "resnet18" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_what_is_compared_against_must_be_there():
    with pytest.raises(ValueError, match=r"'resnet81' is not one of the models\. Did you mean 'resnet18'\?"):
        benchmark_models.main(["--models", "resnet18", "--device", "cpu", "--against", "resnet81"])
