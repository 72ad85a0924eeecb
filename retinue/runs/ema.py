"""Exponential moving average of the weights."""

import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor

from retinue.tasks.base import all_finite, state_of


class EMA(WeightAveraging):
    """Average weights and buffers after every optimiser step; validation, test and checkpoints use the average.

    Args:
        decay: weight of the old average in the new one, per step.
        warmup: use min(decay, (1 + n) / (10 + n)) at step n, so that the average of a short run forgets the initial
            weights.
    """

    def __init__(self, decay: float, warmup: bool):
        def update(averages: list, currents: list, count: Tensor | int) -> None:
            n = int(count)
            rate = min(decay, (1 + n) / (10 + n)) if warmup else decay
            if averages[0].is_floating_point():
                torch._foreach_lerp_(averages, currents, 1 - rate)
            else:
                # Indices and counters have no mean.
                torch._foreach_copy_(averages, currents)

        super().__init__(multi_avg_fn=torch.no_grad()(update))

    def check_finite(self) -> None:
        """Check that every averaged weight and buffer is finite.

        Raises:
            ValueError: one is NaN or infinite.
        """
        model = self._average_model
        if model is not None and not all_finite(state_of(model)):
            raise ValueError("the average of the weights is not finite; the last checkpoint is from before")
