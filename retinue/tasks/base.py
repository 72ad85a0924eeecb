"""What the tasks share: optimiser, schedule, randomness by step, running training figures, a guard against NaN."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models.complexity import complexity
from models.weights import load_weights
from retinue.tasks.optimization import check_optimizer, create_optimizer, create_schedule


class Task(pl.LightningModule):
    """A net and a recipe.

    A subclass builds its net (`build_net`), computes losses and figures (`track` sums the latter up between two rows of
    the log; `val_figures` are the last validation's), and after a test gives its figures (`test_figures`) and writes
    what a person wants to see of it (`write_report`).

    Args:
        model: the net, as `timm.create_model` or a head's builder gives it.
        recipe: epochs, batch_size, optimizer, schedule, ... (`conf/recipe/`).
        compile: `torch.compile` the net.
        channels_last: keep convolution weights in that memory format.
        grad_checkpointing: recompute blocks in the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Mapping,
        *,
        compile: bool = False,
        channels_last: bool = True,
        grad_checkpointing: bool = False,
    ):
        super().__init__()
        check_optimizer(recipe)
        self.model = model.to(memory_format=torch.channels_last) if channels_last else model  # pyright: ignore[reportCallIssue]
        self.recipe = recipe
        self.compile_model = compile
        if grad_checkpointing:
            model.set_grad_checkpointing()  # pyright: ignore[reportCallIssue]
        self._sums: dict[str, Tensor] = {}  # of figure x images, and `images`, since the last row of the log
        self._first_bad_step: Tensor | None = None
        self.val_figures: dict[str, float] = {}  # of the last validation, as `val/loss`, ...
        self.save_images = 0  # pictures of predictions in a report

    @staticmethod
    def build_net(cfg: Any, datamodule: Any) -> nn.Module:
        """Build the net of a run's config for the classes and images of `datamodule`, which is only read."""
        raise NotImplementedError

    @staticmethod
    def data_arguments(cfg: Any) -> dict[str, Any]:
        """Return further arguments of the data module of a run's config, for data that depend on the net."""
        return {}

    def start_from(self, weights: str, drop_classifier: bool) -> None:
        """Load what training begins with: weights of the whole net."""
        load_weights(self.model, weights, drop_classifier=drop_classifier)

    def test_figures(self, datamodule: Any) -> dict[str, Any]:
        """Figures of the test that has just been run, on all ranks."""
        raise NotImplementedError

    def write_report(self, folder: Path, datamodule: Any) -> None:
        """Predictions and pictures of that test."""
        raise NotImplementedError

    def complexity(self, datamodule: Any) -> tuple[int, int]:
        """Parameters, and multiply-accumulates for one image of the data's size."""
        return complexity(self.model, datamodule.image_size, datamodule.in_chans)

    def setup(self, stage: str) -> None:
        if self.compile_model:
            self.model.compile()

    def configure_model(self) -> None:
        """Shard the net over the devices where the strategy asks for it (FSDP2)."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            self.model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]  # FSDP2 takes no other
            mesh = self.device_mesh["data_parallel"]  # pyright: ignore[reportOptionalSubscript]
            for container in reversed(list(self.model.modules())):  # what is inside comes first
                if isinstance(container, nn.Sequential | nn.ModuleList):  # of blocks, or of stages
                    for block in container:
                        if any(block.children()):
                            fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> Any:
        optimizer = create_optimizer(self.model, self.recipe)
        schedule = create_schedule(optimizer, self.recipe, self.steps_per_epoch())
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)

    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch. Lightning's own estimate would drop the loader's state on resume."""
        limit = self.trainer.limit_train_batches
        batches = len(self.trainer.datamodule.train_dataloader())  # pyright: ignore[reportAttributeAccessIssue]
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return math.ceil(batches / self.trainer.accumulate_grad_batches)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout and drop path follow from (seed, epoch, batch, rank), so a resumed run draws what the other drew.
        torch.manual_seed(batch["seed"])

    def track(self, loss: Tensor, images: int, **figures: Tensor) -> None:
        """Add a batch's mean loss and figures to the running means of the log."""
        figures = {"loss": loss, **figures}
        for name, value in figures.items():
            value = value.detach().double() if value.device.type == "cpu" else value.detach().float()
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value * images
        self._sums["images"] = self._sums.get("images", torch.zeros_like(self._sums["loss"])) + images

        step = torch.where(torch.isfinite(loss.detach()), math.inf, float(self.global_step))
        self._first_bad_step = step if self._first_bad_step is None else torch.minimum(self._first_bad_step, step)

    def running_figures(self) -> dict[str, float]:
        """Means on this rank since the last row of the log."""
        images = self._sums["images"]
        return {f"train/{name}": float(value / images) for name, value in self._sums.items() if name != "images"}

    def pop_figures(self) -> dict[str, float]:
        """Means over all ranks since the last call, as `train/loss`, ...; empty where nothing was tracked."""
        self.check_finite()
        sums = {
            name: float(self.trainer.strategy.reduce(value.clone(), reduce_op="sum"))
            for name, value in self._sums.items()
        }
        self._sums = {}
        images = sums.pop("images", 0)
        return {f"train/{name}": value / images for name, value in sums.items()}

    def check_finite(self) -> None:
        """Raises ValueError where a loss since the start, or a weight now, is NaN or infinite."""
        advice = "A lower recipe.optimizer.lr, recipe.clip_grad, or another trainer.precision may help"
        if self._first_bad_step is not None and math.isfinite(bad := float(self._first_bad_step)):
            raise ValueError(f"the loss is not finite at step {int(bad)}; the last checkpoint is from before. {advice}")
        shards = [p.to_local() if isinstance(p, DTensor) else p for p in self.parameters()]
        norms = torch.stack(torch._foreach_norm([shard.detach() for shard in shards if shard.numel()]))
        if not norms.isfinite().all():
            raise ValueError(
                f"the weights are not finite at step {self.global_step}; the last checkpoint is from before. {advice}"
            )

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["train_sums"] = {name: value.clone() for name, value in self._sums.items()}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        device = self.trainer.strategy.root_device  # where the net may not be yet
        self._sums = {name: value.to(device) for name, value in checkpoint.get("train_sums", {}).items()}
