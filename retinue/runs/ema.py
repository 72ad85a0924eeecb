"""Exponential moving average of the weights."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn

from retinue.tasks.base import all_finite, state_of


class EMA(WeightAveraging):
    """Average weights and buffers after every optimiser step; validation, test and checkpoints use the average.

    Lightning's own update reads the number of averages from the device several times a step; here the CPU counts.

    Args:
        decay: weight of the old average in the new one, per step.
        warmup: use min(decay, (1 + n) / (10 + n)) at step n, so that the average of a short run forgets the initial
            weights.
    """

    def __init__(self, decay: float, warmup: bool):
        super().__init__()
        self.decay, self.warmup = decay, warmup
        # Pairs of (averages, current values) of one type each; set when training starts.
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # The net is still on the CPU, but its average must lie on the device that trains.
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            # The CPU counts the updates: reading the number from a GPU would wait for the GPU.
            self._average_model.n_averaged = self._average_model.n_averaged.new_zeros((), device="cpu")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._average_model is not None
        by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for average, current in zip(_tensors(self._average_model.module), _tensors(pl_module), strict=True):
            pair = by_type.setdefault(average.dtype, ([], []))
            pair[0].append(average)
            pair[1].append(current)
        self._pairs = list(by_type.values())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Between the accumulated batches of a step, nothing has changed.
        if trainer.global_step > self._latest_update_step:
            self._latest_update_step = trainer.global_step
            self._update()

    @torch.no_grad()
    def _update(self) -> None:
        assert self._average_model is not None
        n = int(self._average_model.n_averaged)
        rate = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        for averages, currents in self._pairs:
            if n and averages[0].is_floating_point():
                torch._foreach_lerp_(averages, currents, 1 - rate)
            else:
                # The first average is a copy; indices and counters have no mean.
                torch._foreach_copy_(averages, currents)
        self._average_model.n_averaged += 1

    def check_finite(self) -> None:
        """Check that every averaged weight and buffer is finite.

        Raises:
            ValueError: one is NaN or infinite.
        """
        model = self._average_model
        if model is not None and not all_finite(state_of(model)):
            raise ValueError("the average of the weights is not finite; the last checkpoint is from before")


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
