"""Learning-rate schedule that waits for a validation figure to stop improving."""

from typing import Any

from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau


class PlateauScheduler(Scheduler):
    """Warm up linearly by step, then reduce the rate whenever a validation figure has stopped improving.

    torch's `ReduceLROnPlateau` decides when: after more than `patience` validations in which the figure was not better
    than the best one by a factor of 1.0001. `state_dict` holds its whole state, so that a resumed run goes on exactly.

    Args:
        optimizer: The optimiser.
        gamma: Factor of the rate at a plateau.
        patience: Number of validations without a better figure that are waited for.
        min_lr: Rate below which no reduction goes.
        warmup_steps: Number of steps of the warm-up.
        warmup_lr: Rate at the start of the warm-up.
    """

    def __init__(
        self, optimizer: Optimizer, gamma: float, patience: int, min_lr: float, *, warmup_steps: int, warmup_lr: float
    ):
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.warmup_steps, self.warmup_lr = warmup_steps, warmup_lr
        scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        self.plateau = ReduceLROnPlateau(
            optimizer, "max", gamma, patience, min_lr=[min_lr * scale for scale in scales], eps=0.0
        )
        self.step_update(0)

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Set the rate after an optimiser step; after the warm-up only `observe` changes the rate."""
        if num_updates <= self.warmup_steps:
            share = num_updates / self.warmup_steps if self.warmup_steps else 1.0
            self.update_groups([self.warmup_lr + (base - self.warmup_lr) * share for base in self.base_values])

    def observe(self, figure: float, step: int) -> None:
        """Take the figure of the validation after `step` optimiser steps; higher is better."""
        if step >= self.warmup_steps:
            self.plateau.step(figure)

    def state_dict(self) -> dict[str, Any]:
        return {"plateau": self.plateau.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.plateau.load_state_dict(state_dict["plateau"])

    def _get_lr(self, t: int) -> list[float]:
        raise NotImplementedError("the rate depends on the figures, not on the step alone")
