"""Tests of the command that measures models."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retinue.benchmarks import models, single
from retinue.results.benchmark_csv import read_speed
from retinue.tasks import compilation
from scripts import benchmark_models

SCRIPT = Path(benchmark_models.__file__)


def test_models_are_compared_in_rows_with_csv_and_plot(tmp_path, capsys):
    arguments = ["models=[resnet18,resnet10t]", "image_size=64", "batch_size=2", "rounds=2", "threads=1", "device=cpu"]
    arguments += ["against=resnet18", f"out={tmp_path / 'rows.csv'}", f"plot={tmp_path / 'plot.png'}"]
    benchmark_models.main(arguments)
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["what"], row["mode"]) for row in rows] == [
        ("resnet18", "inference"), ("resnet10t", "inference"), ("resnet18", "training"), ("resnet10t", "training"),
    ]  # fmt: skip
    resnet18, resnet10t, trained_resnet18, _ = rows
    assert list(resnet18)[:5] == ["what", "against", "ratio", "shape", "dtype"]
    assert float(resnet18["params_m"]) == pytest.approx(11.689512)
    # At 224 pixels it has 1.82 GMACs.
    assert float(resnet18["macs_g"]) == pytest.approx(0.1486, rel=0.02)
    assert float(resnet18["ratio"]) == 1
    # The ratio depends on what else runs on the machine.
    assert float(resnet10t["ratio"]) > 0
    assert min(float(row[name]) for row in rows for name in ("median_ms", "p20_ms", "p80_ms")) > 0
    # AdamW holds weights, gradients and two moments: four times the 47 MB of weights.
    assert float(trained_resnet18["peak_mb"]) > 4 * 46.8
    assert float(trained_resnet18["peak_mb"]) > float(resnet18["peak_mb"]) > 46.8
    assert float(resnet18["images_per_s"]) == pytest.approx(2000 / float(resnet18["median_ms"]))
    assert "torch" in resnet18["versions"]
    assert "resnet10t" in capsys.readouterr().out
    assert len(np.unique(np.asarray(Image.open(tmp_path / "plot.png").convert("L")))) > 10


def test_a_wildcard_and_single_models_are_in_the_file_that_the_page_reads(tmp_path, monkeypatch, capsys):
    # A process that measures the peak memory takes seconds.
    monkeypatch.setattr(models, "peak_memory_mb", lambda make, device: 1.0)
    monkeypatch.setattr(single, "MAX_CALLS", 20)
    monkeypatch.setattr(single, "CALLS_SECONDS", 0.2)
    arguments = ["models=test_resne?", "image_size=32", "batch_size=2", "rounds=1", "threads=1", "device=cpu"]
    arguments += ["batch_sizes=[4,2]", "latency=true", "parts=true", "energy=true", f"out={tmp_path / 'rows.csv'}"]
    benchmark_models.main(arguments)
    [entry] = read_speed(tmp_path / "rows.csv")
    assert entry["name"] == "test_resnet" and "cores" in entry["conditions"]
    assert [size for size, _ in entry["throughput"]] == [size for size, _ in entry["training_throughput"]] == [2, 4]
    assert list(entry["parts"]) == ["forward", "backward", "optimizer"]
    assert entry["latency_p99_ms"] >= entry["latency_ms"] > 0 and entry["peak_mb"] == 1
    assert "joules_per_image" not in entry
    assert "test_resnet" in capsys.readouterr().out


@pytest.mark.slow
def test_peers_are_compiled_as_our_net(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    arguments = ["models=biformer_nano", "image_size=64", "batch_size=2", "rounds=1", "threads=1", "device=cpu"]
    arguments += ["peers=true", "forms=[eager,compiled]", "train=false", f"out={tmp_path / 'rows.csv'}"]
    benchmark_models.main([*arguments, "against=biformer_nano, gather, matmul, softmax"])
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["biformer_nano", "biformer_nano, gather, matmul, softmax"]
    assert [(row["what"], row["form"]) for row in rows] == [
        (name, form) for form in ("eager", "compiled") for name in names
    ]
    assert [float(row["ratio"]) for row in rows[1::2]] == [1, 1]
    with pytest.raises(ValueError, match="the form graph needs a CUDA device, not cpu"):
        benchmark_models.main([*arguments[:-4], "device=cpu", "forms=graph"])


def test_an_unknown_model_is_one_line_with_the_nearest_name_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "device=cpu", "models=resnet_18"],
        capture_output=True,
        text=True,
        cwd=SCRIPT.parents[1],
    )
    assert done.returncode == 2
    assert "resnet18" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_the_model_that_others_are_compared_against_must_be_listed():
    with pytest.raises(ValueError, match=r"against=resnet81 is not one of the models\. Did you mean 'resnet18'\?"):
        benchmark_models.main(["models=resnet18", "device=cpu", "against=resnet81"])
