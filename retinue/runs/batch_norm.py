"""Batch norm's running statistics in runs of few steps: they are estimated anew before each validation."""

import logging
import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from datamodules.loader import private_rng
from retinue.tasks.base import Task
from retinue.tasks.freezing import is_kept_in_evaluation

log = logging.getLogger(__name__)

# Running statistics follow the net with a delay of about 1 / momentum steps; they count as settled in a run of at least
# this many such delays, which is 200 steps for the usual momentum of 0.1.
DELAYS = 20
# Largest number of training batches that the statistics are estimated from.
MAX_BATCHES = 100


class BatchNormStatistics(Callback):
    """Estimate batch norm's running statistics anew before each validation, if the run has too few steps for them.

    In training, batch norm uses the statistics of the batch; in evaluation it uses running averages of those. In a run
    of few steps the averages still hold the initial values and those of earlier weights, and the figures of a good net
    are then those of a bad one. Here the averages become the mean over the first `MAX_BATCHES` batches of epoch 0, with
    the recipe's augmentation and the weights that are validated ("precise BN", arXiv:2105.07576). The pass depends on
    the seed and the weights alone, so that a resumed run repeats it. The weights never change.

    This callback comes after `EMA`, which replaces the weights before a validation, and before `Checkpoints`.

    Attributes:
        images: number of images that the statistics are estimated from; 0 if the run keeps its running averages.
    """

    def __init__(self) -> None:
        self.images, self._batches = 0, 0

    @property
    def note(self) -> dict[str, str]:
        """Entry `batch_norm` of the result; empty if the statistics were not estimated anew."""
        return {"batch_norm": f"re-estimated from {self.images} images"} if self.images else {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        needed = settling_steps(batch_norms(pl_module.model))
        if stage != "fit" or not needed:
            return
        steps = pl_module.steps_per_epoch() * trainer.max_epochs
        if steps >= needed:
            return
        loader = trainer.datamodule.train_dataloader()
        self._batches = min(len(loader), MAX_BATCHES)
        self.images = self._batches * loader.sampler.batch_size * trainer.world_size // trainer.datamodule.repeats
        if trainer.is_global_zero:
            log.warning(
                "%d steps are too few for batch norm's running statistics (%d are enough): they are re-estimated from "
                "%d training images before each validation", steps, needed, self.images,
            )  # fmt: skip

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._batches:
            estimate(trainer, pl_module, self._batches)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a net that update running averages of their statistics: no frozen ones."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and not is_kept_in_evaluation(m)]
    return [norm for norm in norms if norm.running_mean is not None and norm.momentum]


def settling_steps(layers: Sequence[_BatchNorm]) -> int:
    """Return the number of training steps after which the running averages of all layers have settled."""
    return max((math.ceil(DELAYS / layer.momentum) for layer in layers if layer.momentum), default=0)


def estimate(trainer: pl.Trainer, task: Task, batches: int) -> None:
    """Set the running statistics to their means over the first training batches of epoch 0, on all ranks alike.

    Args:
        trainer: the trainer of the task.
        task: the task, whose weights stay as they are.
        batches: number of batches of each rank.
    """
    layers, modes = batch_norms(task.model), {module: module.training for module in task.model.modules()}
    before = [(layer.momentum, {name: t.clone() for name, t in layer.named_buffers(recurse=False)}) for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        # Without a momentum, running statistics are the mean over all batches.
        layer.momentum = None
    task.model.train()
    loader = trainer.datamodule.train_dataloader()  # pyright: ignore[reportAttributeAccessIssue]
    # Statistics for evaluation are those of images of the data's size.
    loader.sampler.size_of = None
    with private_rng(task.device), trainer.precision_plugin.train_step_context():
        for batch in islice(loader, batches):
            task.observe(trainer.strategy.batch_to_device(batch))
    for module, mode in modes.items():
        module.training = mode
    for layer, (momentum, buffers) in zip(layers, before, strict=True):
        layer.momentum = momentum
        visited = int(layer.num_batches_tracked) > 0  # pyright: ignore[reportArgumentType]
        for name, buffer in layer.named_buffers(recurse=False):
            if name == "num_batches_tracked" or not visited:
                buffer.copy_(buffers[name])
            else:
                buffer.copy_(trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))
