import csv
import subprocess
import sys

import pytest
from torch import nn

from ops import registry
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
    compare_ops.main(["ops=[broken,window,full]", *QUICK])
    rows = table()
    assert rows["broken"]["failed"] == "RuntimeError: no kernel for this"
    assert rows["broken"]["top1"] == "" and rows["broken"]["seeds"] == "0"
    results = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(results) == 4
    for op in ("window", "full"):
        assert rows[op]["seeds"] == "2" and 0 <= float(rows[op]["top1"]) <= 1 and float(rows[op]["ci95"]) >= 0
        assert float(rows[op]["train_images_per_s@16"]) > 0 and float(rows[op]["infer_peak_mb@16"]) > 0
    # Window attention has tables of relative positions, and full attention has none.
    assert float(rows["window"]["params_m"]) > float(rows["full"]["params_m"])
    assert (tmp_path / "compare_ops/ops.png").read_bytes().startswith(b"\x89PNG")

    # A finished run is not repeated.
    compare_ops.main(["ops=window", *QUICK])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == results
    assert table()["window"]["top1"] == rows["window"]["top1"]


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
