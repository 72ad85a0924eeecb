"""Make run folders as `train.py` leaves them, without training."""

import json
from pathlib import Path
from typing import Any

import yaml


def make_run(
    outputs: Path, model: str, seed: int, top1: float | None = None, *, data: str = "digits", **recipe: Any
) -> Path:
    """Make the folder of a finished run with test accuracy `top1`; without `top1`, of a run that has just begun."""
    identity = "".join(f"{name}{value}" for name, value in recipe.items()) or "0a1b2c3d"
    folder = outputs / "classification" / data / model / f"{identity}-s{seed}"
    (folder / "checkpoints").mkdir(parents=True)
    config = {
        "recipe": {"epochs": 2, "optimizer": {"lr": 0.001}} | recipe,
        "task": {"name": "classification", "figure": "top1"},
        "data": {"name": data, "num_workers": 0},
        "model": {"mixers": None},
        "trainer": {"devices": 1, "precision": "fp32"},
        "seed": seed,
        "run_dir": str(folder),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    rows = ["step,epoch,train/loss,val/loss,val/top1", "5,0.5,2.2,,", "10,1,2.0,1.9,0.2", f"20,2,1.8,1.7,{top1 or 0.4}"]
    (folder / "metrics.csv").write_text("\n".join(rows))
    if top1 is not None:
        metrics = {"test/n": 100, "test/top1": top1, "test/top1_ci95": [0, 1], "test/loss": 1 - top1}
        write_result(folder, model, seed, metrics, data=data)
    return folder


def write_result(folder: Path, model: str, seed: int, metrics: dict[str, Any], **more: Any) -> None:
    """Write `result.json`; the longer the model's name, the larger and slower the model."""
    size = 1_000_000 * len(model)
    result = {
        "status": "finished",
        "task": "classification",
        "model": model,
        "data": "digits",
        "seed": seed,
        "metrics": metrics,
        "params": size,
        "macs": 3 * size,
        "images_per_second": 1e9 / size,
        "peak_memory_mb": 900.0,
        "versions": {"torch": "2.11"},
    } | more
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))


def fail(folder: Path, reason: str) -> None:
    """Write `failed.json` with this reason."""
    (folder / "failed.json").write_text(json.dumps({"reason": reason, "time": "2026-11-21T10:00:00"}))
