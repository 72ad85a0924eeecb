import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from torch import nn

from ops import registry
from retinue.results.compare_ops import TUNING_SEED
from scripts import compare_ops

QUICK = (
    "seeds=[0,1]", "rounds=1", "batch_size=2", "model.size=nano", "+model.args.depths=[1,1,1,1]",
    "data.image_size=16", "recipe.epochs=1", "recipe.batch_size=32", "trainer.limit_train_batches=3",
    "trainer.accelerator=cpu", "logger=none", "data.num_workers=0",
)  # fmt: skip


class Broken(nn.Module):
    def __init__(self, dim, num_heads, *, place=registry.FIRST):
        super().__init__()
        self.weight = nn.Linear(dim, dim)

    def forward(self, x):
        raise RuntimeError("no kernel\nfor this")


def table():
    with open("compare_ops/ops.csv", newline="") as file:
        return {row["what"]: row for row in csv.DictReader(file)}


def test_ops_are_compared_and_a_broken_one_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(registry._OPS, "broken", Broken)
    compare_ops.main(["ops=[broken,window,full]", "sight=[erf]", *QUICK])
    rows = table()
    assert rows["broken"]["failed"] == "RuntimeError: no kernel for this"
    assert rows["broken"]["top1"] == rows["broken"]["seeds"] == ""
    results = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(results) == 4
    for op in ("window", "full"):
        row = {name: float(rows[op][name]) for name in ("top1_low", "top1", "top1_high")}
        assert rows[op]["seeds"] == "2" and sorted([0, *row.values(), 1]) == [0, *row.values(), 1]
        assert float(rows[op]["train_images_per_s@16"]) > 0 and float(rows[op]["infer_peak_mb@16"]) > 0
    # Window attention has tables of relative positions, and full attention has none.
    assert float(rows["window"]["params_m"]) > float(rows["full"]["params_m"])
    # All are compared with `window`, over the same seeds.
    assert rows["window"]["diff"] == "" and float(rows["full"]["diff"]) == pytest.approx(
        float(rows["full"]["top1"]) - float(rows["window"]["top1"])
    )
    assert (rows["window"]["family"], rows["window"]["growth"], rows["full"]["growth"]) == ("local", "N^1.0", "N^2.0")
    for picture in ("ops.png", "ops_erf.png"):
        assert (tmp_path / "compare_ops" / picture).read_bytes().startswith(b"\x89PNG")
    # One run of each op that has one is shown.
    with np.load("compare_ops/ops_erf.npz") as arrays:
        assert set(arrays.files) == {f"{op}/{name}" for op in ("window", "full") for name in ("blocks", "fields")}

    # A finished run is not repeated.
    compare_ops.main(["ops=window", *QUICK])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == results
    assert table()["window"]["top1"] == rows["window"]["top1"]


def test_gates_are_compared_with_the_net_without_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compare_ops.main(["kind=gate", "gates=[ela]", "seeds=[0]", *QUICK[1:]])
    with open("compare_ops/gates.csv", newline="") as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"none", "ela"}
    # Four blocks of 32, 64, 128 and 256 channels, with 9 parameters for each channel.
    added = float(rows["ela"]["params_m"]) - float(rows["none"]["params_m"])
    assert added * 1e6 == pytest.approx(9 * 480)
    configs = [yaml.safe_load(path.read_text()) for path in tmp_path.rglob("config.yaml")]
    assert {cfg["model"]["gates"] for cfg in configs} == {None, "ela"}
    with pytest.raises(ValueError, match=r"no gate is called 'elaa'\. Did you mean 'ela'"):
        compare_ops.main(["kind=gate", "gates=[elaa]"])
    with pytest.raises(ValueError, match="gates are compared with kind=gate, not kind=op"):
        compare_ops.main(["gates=[ela]"])


@pytest.mark.slow
def test_ops_are_matched_tuned_and_tested_at_other_sizes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = ["ops=[conv_enhanced_window]", "baseline=window", "match=macs", "tune=2", "test_sizes=[8,24]"]
    arguments = [*chosen, *QUICK[1:], "seeds=[0]"]
    compare_ops.main(arguments)
    rows = table()
    op, baseline = rows["conv_enhanced_window"], rows["window"]
    assert int(op["width"].removeprefix("dim=")) < 32 and baseline["width"] == ""
    assert float(op["macs_g"]) == pytest.approx(float(baseline["macs_g"]), rel=0.1)
    runs = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/classification/*/*/*/result.json")]
    # Two trials of each op, and a run with a fresh seed.
    assert sorted(run["seed"] for run in runs) == [0, 0, *[TUNING_SEED] * 4]
    for row in rows.values():
        assert row["tuned"].startswith("lr=") and 0 <= float(row["top1@8"]) <= 1 and 0 <= float(row["top1@24"]) <= 1
    # The trial with the better validation was chosen, and its values are those of the runs.
    for name, row in rows.items():
        configs = [
            yaml.safe_load(path.read_text()) for path in tmp_path.glob("outputs/classification/*/*/*/config.yaml")
        ]
        own = [cfg for cfg in configs if cfg["model"]["mixers"] == name]
        best = max((cfg for cfg in own if cfg["seed"] == TUNING_SEED), key=validation)
        values = [cfg["recipe"]["optimizer"] for cfg in (*(cfg for cfg in own if cfg["seed"] != TUNING_SEED), best)]
        assert all(value == values[0] for value in values)
        assert row["tuned"] == f"lr={values[0]['lr']} weight_decay={values[0]['weight_decay']}"
    page = (tmp_path / "compare_ops/ops.html").read_text()
    assert all(text in page for text in ("digits (classification)", "evaluated at 8 px", "evaluated at 24 px"))

    # Nothing is done twice.
    results = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    compare_ops.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == results


def validation(cfg):
    with open(f"{cfg['run_dir']}/metrics.csv", newline="") as file:
        return max(float(row["val/top1"]) for row in csv.DictReader(file) if row["val/top1"])


def test_the_seed_of_the_trials_is_no_seed_of_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"seed {TUNING_SEED} is that of the trials"):
        compare_ops.main(["ops=[full]", "tune=1", f"seeds=[{TUNING_SEED}]"])
    assert not list(tmp_path.iterdir())


def test_an_unknown_op_is_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no op is called 'windw'\. Did you mean 'window'"):
        compare_ops.main(["ops=[full,windw]", *QUICK])
    assert not list(tmp_path.iterdir())


def test_a_mistyped_key_is_answered_in_one_line(tmp_path):
    command = [sys.executable, compare_ops.__file__, "seedz=1", "ops=window"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no key 'seedz' in the config. Did you mean 'seed'?")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
