"""A trained run is tested with token reductions from the command line."""

import csv
import json
from pathlib import Path

import pytest

from models import complexity
from models.factory import build
from retinue.runs.config import register_resolvers
from retinue.runs.many import train_all
from scripts import compare_reduction

QUICK = (
    "model=deit", "model.size=nano", "+model.args.dim=48", "data.image_size=16", "recipe.epochs=1",
    "trainer.limit_train_batches=3", "trainer.accelerator=cpu", "logger=none", "data.num_workers=0",
)  # fmt: skip
TEST = ("trainer.accelerator=cpu", "data.num_workers=0", "rounds=1", "batch_size=2", "device=cpu")


def rows() -> list[dict[str, str]]:
    with open("compare_reduction/reduction.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_is_tested_with_reductions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register_resolvers()
    run = train_all({0: QUICK}, Path("outputs"))[0]
    assert isinstance(run, Path), run
    compare_reduction.main([f"run={run}", "reductions=[tome,evit]", "amounts=[1,0.25]", *TEST])
    plain, same, merged, *evit = table = rows()
    assert [(row["what"], float(row["left"])) for row in table] == [
        ("none", 1), ("tome", 1), ("tome", 0.25), ("evit", 1), ("evit", 0.25)
    ]  # fmt: skip
    # All tokens are left, so the test is that of the run itself.
    result = json.loads((run / "result.json").read_text())
    assert float(plain["top1"]) == float(same["top1"]) == float(evit[0]["top1"]) == result["metrics"]["test/top1"]
    assert float(plain["macs_g"]) == float(same["macs_g"]) == pytest.approx(result["macs"] / 1e9)
    net = build(
        "deit_tiny", patch=4, depths=(4,), dim=48, img_size=16, num_classes=10, reduction={"name": "tome", "keep": 0.25}
    )
    assert merged["arguments"] == "keep=0.25" and float(merged["macs_g"]) == complexity(net, 16, 3)[1] / 1e9
    assert all(float(row["images_per_s"]) > 0 and float(row["top1_low"]) <= float(row["top1"]) for row in table)
    assert float(plain["speedup"]) == 1
    assert Path("compare_reduction/reduction.png").read_bytes().startswith(b"\x89PNG")

    # Finished evaluations are not repeated.
    results = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(results) == 6
    compare_reduction.main([f"run={run}", "reductions=tome", "amounts=0.25", *TEST])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == results
    assert rows()[1]["top1"] == merged["top1"]

    for arguments, message in (
        (["reductions=tom"], "no reduction is called 'tom'. Did you mean 'tome'"),
        (["amounts=1.5"], "amounts must be shares of the tokens above 0 and at most 1, not 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_reduction.main([f"run={run}", *arguments, *TEST])
