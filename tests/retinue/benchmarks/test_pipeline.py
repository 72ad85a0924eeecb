"""Test that both input pipelines do the same."""

from typing import Any

import pytorch_lightning as pl
import torch

from retinue.benchmarks import limits, pipeline


def test_both_sides_yield_the_same_kind_of_batch(tmp_path):
    """Compare shape, type, mean and spread: otherwise the times could not be compared."""
    # timm's side draws from the global generators.
    pl.seed_everything(0, verbose=False)
    pipeline.make_photos(tmp_path, 48)
    sides = (make(tmp_path, 32, 48) for make in (pipeline.retinue_batches, pipeline.timm_batches))
    # One share mixes a whole batch, so the statistics need several batches.
    retinue, timm = (torch.stack([next(side) for _ in range(8)]) for side in sides)
    assert retinue.shape == timm.shape == (8, 48, 3, 32, 32)
    assert retinue.dtype == timm.dtype == torch.float32
    assert abs(retinue.mean() - timm.mean()) < 0.4
    assert 0.7 < retinue.std() / timm.std() < 1.4


def test_what_limits_a_run_follows_from_the_rates():
    rates = {"core": 100.0, "input": 390.0, "step": 1000.0, "input and step": 380.0}
    rows: list = [
        {"what": what, "images_per_s": rate, "workers": 4, "cores": 1000.0 / 100.0} for what, rate in rates.items()
    ]
    assert limits.verdict(rows) == (
        "The input limits the run: 4 loading processes deliver 390 images/s, the step trains 1000, both together reach "
        "380; one core loads 100, so the step needs 10.0 cores."
    )
    rows[1]["images_per_s"] = 1200.0
    assert limits.verdict(rows).startswith("The step limits the run")


def test_a_run_with_loading_processes_is_measured():
    augment = {"device": "gpu", "decode": "reduced"}
    rows: list[Any] = limits.measure(
        "resnet10t", torch.device("cpu"), "float32", 32, 4, workers=1, batches=2, augment=augment
    )
    assert [row["what"] for row in rows] == ["core", "input", "step", "input and step"]
    rates = {row["what"]: row["images_per_s"] for row in rows}
    assert all(rate > 0 for rate in rates.values())
    assert all(abs(row["cores"] - rates["step"] / rates["core"]) < 1e-6 * row["cores"] for row in rows)
