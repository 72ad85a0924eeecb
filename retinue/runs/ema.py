"""Exponential moving average of the weights."""

from itertools import chain
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from retinue.tasks.base import all_finite


class EMA(Callback):
    """Average weights and buffers after every optimiser step; validation, test and checkpoints use the average.

    A checkpoint holds the average as `state_dict` and the weights in training as `current_model_state`. Of a net that
    FSDP shards, each rank averages its own shards, which are put together for a checkpoint only.

    Args:
        decay: weight of the old average in the new one, per step.
        warmup: use min(decay, (1 + n) / (10 + n)) at step n, so that the average of a short run forgets the initial
            weights.
    """

    def __init__(self, decay: float, warmup: bool):
        self.decay, self.warmup = decay, warmup
        # Number of updates, and the optimiser step of the last one. The CPU counts: reading a number from a GPU would
        # wait for the GPU.
        self._updates, self._step = 0, 0
        # Averages and current values of the weights and buffers; set when training starts.
        self._averages: list[Tensor] = []
        self._currents: list[Tensor] = []
        # Weights in training of the checkpoint from which the run is resumed.
        self._resumed: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A resumed net holds the checkpoint's `state_dict` now, which is the average.
        self._averages = [value.clone() for value in _tensors(pl_module)]
        if self._resumed is not None:
            _load(pl_module, self._resumed)
            self._resumed = None
        self._currents = _tensors(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Between the accumulated batches of a step, nothing has changed.
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self._update()

    @torch.no_grad()
    def _update(self) -> None:
        n = self._updates
        rate = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for average, current in zip(self._averages, self._currents, strict=True):
            averages, currents = by_type.setdefault(average.dtype, ([], []))
            averages.append(average)
            currents.append(current)
        for averages, currents in by_type.values():
            if n and averages[0].is_floating_point():
                torch._foreach_lerp_(averages, currents, 1 - rate)
            else:
                # The first average is a copy; indices and counters have no mean.
                torch._foreach_copy_(averages, currents)
        self._updates += 1

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        """Exchange the values of the averages and of the net."""
        _reshard(module)
        for average, current in zip(self._averages, self._currents, strict=True):
            kept = average.clone()
            average.copy_(current)
            current.copy_(kept)

    def check_finite(self) -> None:
        """Check that every averaged weight and buffer is finite.

        Raises:
            ValueError: one is NaN or infinite.
        """
        if not all_finite(self._averages):
            raise ValueError("the average of the weights is not finite; the last checkpoint is from before")

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = state_dict["latest_update_step"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        self._swap(pl_module)
        average = trainer.strategy.lightning_module_state_dict()
        # The values are copied, since the net's own tensors hold the weights in training again afterwards.
        checkpoint["state_dict"] = {name: value.detach().to("cpu", copy=True) for name, value in average.items()}
        self._swap(pl_module)
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._updates)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._updates = int(checkpoint["averaging_state"]["n_averaged"])
        self._resumed = checkpoint["current_model_state"]


def _reshard(module: nn.Module) -> None:
    """Free the whole weights that FSDP keeps after an evaluation, which would hide a change of the shards."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _tensors(module: nn.Module) -> list[Tensor]:
    """Return the weights and buffers of a module; of sharded ones, the shards of this rank."""
    _reshard(module)
    tensors = [tensor.detach() for tensor in chain(module.parameters(), module.buffers())]
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _load(module: nn.Module, state: dict[str, Any]) -> None:
    """Load the state of a whole net into a net that may be sharded."""
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(state)
