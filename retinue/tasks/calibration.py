"""Fit of a classifier's temperature to the validation split; `retinue.evaluation.calibration` describes the method."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from retinue.evaluation.calibration import find_temperature, loss_slope
from retinue.tasks.classification import Classification


class TemperatureScaling(pl.LightningModule):
    """A validation of this module sets the temperature of a classification task.

    The logits of the split are kept in the processor's memory. For 50,000 images and 1,000 classes they take 200 MB,
    and the fit, in float64, 1.2 GB more.

    Args:
        task: The task, with the weights to calibrate.

    Raises:
        ValueError: In a validation: a logit is not finite, or no image has one of the classes that are compared.
    """

    def __init__(self, task: Classification):
        super().__init__()
        self.task = task
        # Logits (B, K) and labels (B,) of this rank's images, by batch.
        self._batches: list[tuple[Tensor, Tensor]] = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        logits, label = self.task(batch["image"]).float().cpu(), batch["label"].cpu()
        subset = self.trainer.datamodule.class_subset  # pyright: ignore[reportAttributeAccessIssue]
        # Images that pad the last batch of a rank have the index -1.
        counted = batch["index"].cpu() >= 0
        if subset is not None:
            classes = torch.tensor(subset)
            counted &= torch.isin(label, classes)
            position = torch.zeros(logits.shape[1], dtype=torch.int64)
            position[classes] = torch.arange(len(classes))
            logits, label = logits[:, classes], position[label]
        self._batches.append((logits[counted], label[counted]))

    def on_validation_epoch_end(self) -> None:
        batches, self._batches = self._batches, []
        logits, label = map(torch.cat, zip(*batches, strict=True))
        # Each rank learns of bad logits of another rank, so that none waits for a rank that has stopped.
        bad = self._sum(float((~logits.isfinite().all(1)).sum()))
        if bad or not self._sum(float(len(label))):
            reason = f"the logits of {bad:.0f} images are not finite" if bad else "none of its images counts"
            raise ValueError(f"no temperature can be fitted to the validation split: {reason}")
        logits = logits.double()
        self.task.temperature = find_temperature(lambda inverse: self._sum(loss_slope(logits, label, inverse)))

    def _sum(self, value: float) -> float:
        """Return the sum of a value over the ranks."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        return float(self.trainer.strategy.reduce(tensor, reduce_op="sum"))
