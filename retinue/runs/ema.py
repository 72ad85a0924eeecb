"""Exponential moving average of the weights."""

from itertools import chain
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor

from retinue.tasks.base import all_finite, state_of


class EMA(WeightAveraging):
    """Average weights and buffers after every optimiser step; validation, test and checkpoints use the average.

    The average lies on the device that trains, and one step of it waits for nothing there.

    Args:
        decay: weight of the old average in the new one, per step.
        warmup: use min(decay, (1 + n) / (10 + n)) at step n, so that the average of a short run forgets the initial
            weights.
    """

    def __init__(self, decay: float, warmup: bool):
        super().__init__()
        self.decay, self.warmup = decay, warmup

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # The net is still on the CPU; an average there would fetch all weights from the GPU in every step.
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            # The step is read in every step, which would wait for the GPU.
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step > self._latest_update_step:
            self.update(pl_module)
            self._latest_update_step = trainer.global_step

    @torch.no_grad()
    def update(self, module: pl.LightningModule) -> None:
        """Add the weights and the buffers of a module to the average; the first ones become the average."""
        model = self._average_model
        assert model is not None
        n = int(model.n_averaged)
        rate = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        pairs: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        averages = chain(model.module.parameters(), model.module.buffers())
        for average, current in zip(averages, chain(module.parameters(), module.buffers()), strict=True):
            pairs.setdefault(average.dtype, []).append((average, current))
        for dtype, tensors in pairs.items():
            averages, currents = (list(side) for side in zip(*tensors, strict=True))
            if dtype.is_floating_point and n:
                torch._foreach_lerp_(averages, currents, 1 - rate)
            else:
                # Indices and counters have no mean.
                torch._foreach_copy_(averages, currents)
        model.n_averaged += 1

    def check_finite(self) -> None:
        """Check that every averaged weight and buffer is finite.

        Raises:
            ValueError: one is NaN or infinite.
        """
        model = self._average_model
        if model is not None and not all_finite(state_of(model)):
            raise ValueError("the average of the weights is not finite; the last checkpoint is from before")
