"""Exponential moving average of the weights."""

import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor


class EMA(WeightAveraging):
    """Averages weights and buffers after every optimiser step; the average is what is validated, tested and saved.

    Args:
        decay: of the average, per step.
        warmup: use min(decay, (1 + n) / (10 + n)) at the n-th step, so that short runs forget where they started.
    """

    def __init__(self, decay: float, warmup: bool):
        def update(averages: list, currents: list, count: Tensor | int) -> None:
            n = int(count)
            rate = min(decay, (1 + n) / (10 + n)) if warmup else decay
            if averages[0].is_floating_point():
                torch._foreach_lerp_(averages, currents, 1 - rate)
            else:  # indices and counters have no mean
                torch._foreach_copy_(averages, currents)

        super().__init__(multi_avg_fn=torch.no_grad()(update))
