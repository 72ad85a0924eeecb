"""Test that both input pipelines do the same."""

import pytorch_lightning as pl
import torch

from retinue.benchmarks import pipeline


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
