"""Base of the tasks: optimiser, schedule, random seeds by step, running means of training, and a guard against NaN."""

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models.classifier_rows import ClassifierRows
from models.complexity import complexity
from models.weights import load_weights
from retinue.evaluation.contributions import Contributions
from retinue.tasks.compilation import compile_net, seconds_gained
from retinue.tasks.freezing import freeze, keep_in_evaluation
from retinue.tasks.map_distillation import MapDistillation
from retinue.tasks.not_finite import save_batch
from retinue.tasks.optimization import check_optimizer, clip_adaptively, create_optimizer, create_schedule
from retinue.tasks.plateau import PlateauScheduler

log = logging.getLogger(__name__)

NOT_FINITE_ADVICE = "a lower recipe.optimizer.lr, recipe.clip_grad, or another trainer.precision may help"


class Task(pl.LightningModule):
    """A net that is trained by a recipe and evaluated.

    A subclass builds the net (`build_net`), computes losses and figures in Lightning's steps, passes those of training
    to `track`, sets `val_figures` after each validation, returns the figures of a test (`test_figures`) and writes
    predictions and pictures of it (`write_report`). Images without labels pass through `predict_step` instead, and then
    through `write_predictions`, `describe_predictions` and `draw_prediction`.

    Args:
        model: The net, as `build_net` returns it.
        recipe: Epochs, batch_size, optimizer, schedule, ...: a composed `conf/recipe/*.yaml`.
        compile: Compile the net by `torch.compile`: True; "reduce-overhead", which also replays its kernels as CUDA
            graphs; or "auto", which compiles on a GPU if the training is long enough to pay for it.
        channels_last: Keep the weights of convolutions in channels-last memory.
        grad_checkpointing: Recompute blocks in the backward pass, which takes less memory and more time.
        figure: Name of the validation figure, without `val/`, that a plateau schedule follows.
        log_grad_norm: Log the mean norm of the gradients over the steps, before clipping, as `train/grad_norm`.

    Attributes:
        val_figures: Figures of the epoch's validation by name: `val/loss`, ...; empty before it.
        save_images: Number of pictures of predictions in a report.
        predictions_folder: Folder to which a test writes the predictions of each image. None writes only those that
            every report has.

    Raises:
        ValueError: The recipe's optimiser or schedule is unknown, or the net has no part that the recipe freezes.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Mapping,
        *,
        compile: bool | str = False,
        channels_last: bool = True,
        grad_checkpointing: bool = False,
        figure: str | None = None,
        log_grad_norm: bool = False,
    ):
        super().__init__()
        check_optimizer(recipe)
        self.model = model.to(memory_format=torch.channels_last) if channels_last else model  # pyright: ignore[reportCallIssue]
        self.recipe, self.figure = recipe, figure
        self.frozen_modules = freeze(model, recipe["freeze"]) if recipe.get("freeze") else []
        self.compile_choice, self.cuda_graphs = compile, compile == "reduce-overhead"
        if grad_checkpointing:
            model.set_grad_checkpointing()  # pyright: ignore[reportCallIssue]
        # Losses that learn too, of which `prepare_training` builds one at most: between this net's maps and those of a
        # teacher, and between the features of images.
        self.map_distillation: MapDistillation | None = None
        self.margin: nn.Module | None = None
        # Sums since the last row of the log: of figure * images by the figure's name, and the number of `images`.
        self._sums: dict[str, Tensor] = {}
        self.log_grad_norm = log_grad_norm
        # Images since the last optimiser step.
        self._step_images = 0
        # First batch of the epoch whose loss is not finite; infinity if there is none.
        self._first_bad_batch: Tensor | None = None
        self._batch_idx = 0
        # True for the first batch of an optimiser step; updated with CUDA graphs only.
        self._first_of_step = True
        self.val_figures: dict[str, float] = {}
        self.save_images = 0
        self.predictions_folder: Path | None = None

    @staticmethod
    def build_net(cfg: Any, datamodule: Any) -> nn.Module:
        """Build the net of a run's config for the classes and images of `datamodule`, which is only read."""
        raise NotImplementedError

    @staticmethod
    def data_arguments(cfg: Any) -> dict[str, Any]:
        """Return further arguments for the data module of a run's config, where the data depend on the net."""
        return {}

    @staticmethod
    def adapt_data(cfg: Any, datamodule: Any) -> Any:
        """Return the data module that the task reads; a task may wrap that of the config."""
        return datamodule

    def start_from(self, weights: str, drop_classifier: bool, classifier_rows: ClassifierRows | None = None) -> None:
        """Load the weights that training starts from.

        Args:
            weights: A weights file of the whole net.
            drop_classifier: Leave out a classifier of another width.
            classifier_rows: Rows of the file's classifier for the data's classes, for tasks with a classifier.

        Raises:
            ValueError: The file cannot be read, or its weights do not fit.
        """
        load_weights(self.model, weights, drop_classifier=drop_classifier, classifier_rows=classifier_rows)

    def prepare_training(self, datamodule: Any) -> None:
        """Build what training alone needs beside the net, and what its checkpoints hold; a test does not call this."""

    def test_figures(self, datamodule: Any) -> dict[str, Any]:
        """Return the figures of the last test by name, the same on all ranks."""
        raise NotImplementedError

    def contributions(self, datamodule: Any) -> Contributions | None:
        """Return what each image of the last test adds to the figures, the same on all ranks; None if unknown."""
        raise NotImplementedError

    def write_report(self, folder: Path, datamodule: Any) -> None:
        """Write predictions and pictures of the last test into `folder`."""
        raise NotImplementedError

    def write_predictions(self, folder: Path, datamodule: Any) -> None:
        """Write the predictions of the last test or prediction into `folder`."""
        raise NotImplementedError

    def describe_predictions(self, datamodule: Any) -> dict[int, str]:
        """Return the prediction of each image that could be read in a few words, by the image's position."""
        raise NotImplementedError

    def draw_prediction(self, path: Path, index: int, datamodule: Any) -> None:
        """Draw the prediction of the image at a position; `write_predictions` has been called."""
        raise NotImplementedError

    def complexity(self, datamodule: Any) -> tuple[int, int]:
        """Return the number of parameters, and the multiply-accumulates for one image of the data's size."""
        return complexity(self.model, datamodule.image_size, datamodule.in_chans)

    @property
    def frozen_note(self) -> dict[str, int]:
        """Entry `trainable_params` of the result, the number of parameters that learn; empty if nothing is frozen."""
        if not self.frozen_modules:
            return {}
        return {"trainable_params": sum(p.numel() for p in self.model.parameters() if p.requires_grad)}

    @property
    def compiled_part(self) -> tuple[nn.Module, bool]:
        """The part of the net that is compiled, and whether all images have one size."""
        return self.model, self.recipe["augment"].get("sizes") is None

    def setup(self, stage: str) -> None:
        if not self.compile_choice:
            return
        net, one_size = self.compiled_part
        if self.compile_choice != "auto" or (stage == "fit" and self.gains_by_compiling(net)):
            compile_net(net, cuda_graphs=self.cuda_graphs, one_size=one_size)

    def gains_by_compiling(self, net: nn.Module) -> bool:
        """Tell whether training gains by compiling the net, and log the reason."""
        if self.trainer.strategy.root_device.type != "cuda":
            choice, reason = "not compiled", "there is no GPU"
        else:
            steps = self.steps_per_epoch() * (self.trainer.max_epochs or 0)
            cost, gain = seconds_gained(net, steps)
            choice = "compiled" if gain > cost else "not compiled"
            reason = f"by estimate it takes {cost:.0f} s and saves {gain:.0f} s in {steps} steps"
        if rank_zero_only.rank == 0:
            log.warning("task.compile=auto: the net is %s, since %s", choice, reason)
        return choice == "compiled"

    def configure_model(self) -> None:
        """Shard the net over the devices if the strategy asks for it (FSDP2)."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            # FSDP2 takes contiguous weights only.
            self.model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
            mesh = self.device_mesh["data_parallel"]  # pyright: ignore[reportOptionalSubscript]
            # FSDP2 shards inner modules before outer ones. The units are the modules in each sequence or list: blocks,
            # stages and the like.
            for container in reversed(list(self.model.modules())):
                if isinstance(container, nn.Sequential | nn.ModuleList):
                    for block in container:
                        if any(block.children()):
                            fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> Any:
        optimizer = create_optimizer(self.model, self.recipe, self.map_distillation or self.margin)
        schedule = create_schedule(optimizer, self.recipe, self.steps_per_epoch())
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if self.recipe.get("clip_mode") == "agc":
            clip_adaptively(self.model, gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def steps_per_epoch(self) -> int:
        """Return the number of optimiser steps of an epoch.

        Lightning's own estimate would create a new loader on resume and lose the loaded state of the old one.
        """
        limit = self.trainer.limit_train_batches
        batches = len(self.trainer.datamodule.train_dataloader())  # pyright: ignore[reportAttributeAccessIssue]
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return math.ceil(batches / self.trainer.accumulate_grad_batches)

    def on_fit_start(self) -> None:
        # trainer.sync_batchnorm has replaced the batch norms by new modules.
        keep_in_evaluation(self.model, self.frozen_modules)

    def on_train_start(self) -> None:
        # A run that is resumed within an epoch does not start this epoch again.
        self._plan_validation()

    def on_train_epoch_start(self) -> None:
        self.val_figures = {}
        self._plan_validation()

    def _plan_validation(self) -> None:
        """Validate every `val_every` epochs and in the last epoch, if the recipe says so."""
        if (every := self.recipe.get("val_every")) is not None:
            is_last = self.current_epoch + 1 == self.trainer.max_epochs
            self.trainer.check_val_every_n_epoch = 1 if is_last else every

    def on_train_epoch_end(self) -> None:
        schedule = self.lr_schedulers()
        # TrainingLog has logged the rate of the epoch, and Checkpoints saves the new one.
        if isinstance(schedule, PlateauScheduler) and self.val_figures:
            schedule.observe(self.val_figures[f"val/{self.figure}"], self.global_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout and drop path follow from (seed, epoch, batch, rank), so a resumed run draws the same numbers as a run
        # without interruption.
        torch.manual_seed(batch["seed"])
        self._batch_idx = batch_idx
        if self.cuda_graphs:
            self._first_of_step = batch_idx % self.trainer.accumulate_grad_batches == 0
            if self._first_of_step:
                # The gradients lie in memory that the next replay overwrites.
                self.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()

    def on_after_backward(self) -> None:
        if self.cuda_graphs and self._first_of_step and self.trainer.accumulate_grad_batches > 1:
            # The next batch of the step overwrites the memory of these gradients, and then adds its own.
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.clone()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.log_grad_norm:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            self._add("grad_norm", _precise(norm) * self._step_images)
            self._step_images = 0

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def gather(self, own: Any) -> list[Any]:
        """Return what each rank passes, by rank."""
        if self.trainer.world_size == 1:
            return [own]
        parts: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(parts, own)
        return parts

    def observe(self, batch: Any) -> None:
        """Run a training step's forward pass for the layers that keep statistics; nothing is logged."""
        kept, self._sums = (self._sums, self._first_bad_batch, self._step_images), {}
        torch.manual_seed(batch["seed"])
        self.training_step(batch, 0)
        self._sums, self._first_bad_batch, self._step_images = kept

    def track(self, loss: Tensor, images: int, **figures: Tensor) -> None:
        """Add a batch to the running means of the log.

        Args:
            loss: Mean loss of the batch, a scalar.
            images: Number of images in the batch, the weight of its means.
            figures: Further means of the batch by name, scalars.
        """
        figures = {"loss": loss, **figures}
        for name, value in figures.items():
            self._add(name, _precise(value) * images)
        self._add("images", torch.full_like(self._sums["loss"], images))
        self._step_images += images

        batch = torch.where(torch.isfinite(loss.detach()), math.inf, float(self._batch_idx))
        self._first_bad_batch = batch if self._first_bad_batch is None else torch.minimum(self._first_bad_batch, batch)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def running_figures(self) -> dict[str, float]:
        """Return the means on this rank since the last row of the log, as `train/loss`, ..."""
        images = self._sums["images"]
        return {f"train/{name}": float(value / images) for name, value in self._sums.items() if name != "images"}

    def pop_figures(self) -> dict[str, float]:
        """Return the means over all ranks since the last call, as `train/loss`, ..., and start new ones.

        The result is empty if nothing was tracked.

        Raises:
            ValueError: A loss or a weight is not finite.
        """
        self.check_finite()
        sums = {
            name: float(self.trainer.strategy.reduce(value.clone(), reduce_op="sum"))
            for name, value in self._sums.items()
        }
        self._sums = {}
        images = sums.pop("images", 0)
        return {f"train/{name}": value / images for name, value in sums.items()}

    def check_finite(self) -> None:
        """Check that every loss of the epoch, and every weight and buffer now, is finite.

        The batch of the first loss that is not is written into the run's folder (`save_batch`).

        Raises:
            ValueError: A loss, a weight or a buffer is NaN or infinite.
        """
        first_bad_batch = math.inf if self._first_bad_batch is None else float(self._first_bad_batch)
        if math.isfinite(first_bad_batch):
            batch = int(first_bad_batch)
            step = self.current_epoch * self.steps_per_epoch() + batch // self.trainer.accumulate_grad_batches
            path = save_batch(self.trainer, batch, step)
            raise ValueError(
                f"the loss is not finite at step {step}; the last checkpoint is from before; {path} holds the batch; "
                + NOT_FINITE_ADVICE
            )
        if not all_finite(state_of(self)):
            raise ValueError(
                f"the weights are not finite at step {self.global_step}; the last checkpoint is from before; "
                + NOT_FINITE_ADVICE
            )

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["train_sums"] = {name: value.clone() for name, value in self._sums.items()}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        # The net may still be on the CPU, so take the device that it will train on.
        device = self.trainer.strategy.root_device
        self._sums = {name: value.to(device) for name, value in checkpoint.get("train_sums", {}).items()}


def _precise(value: Tensor) -> Tensor:
    """Return a scalar without its graph: float64, or float32 on devices where float64 is slow or missing."""
    return value.detach().double() if value.device.type == "cpu" else value.detach().float()


def state_of(module: nn.Module) -> list[Tensor]:
    """Return the weights and the buffers that a checkpoint of the module holds."""
    saved = module.state_dict(keep_vars=True).values()
    return [value for value in saved if isinstance(value, Tensor)]


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether no value of the tensors is NaN or infinite; of sharded tensors, the shards of this rank count."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        shard = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        if shard.numel() and shard.is_floating_point():
            by_type.setdefault(shard.dtype, []).append(shard)
    # The maximum of the absolute values cannot overflow, and is NaN if a value is.
    return all(
        bool(torch.stack(list(torch._foreach_norm(shards, math.inf))).isfinite().all()) for shards in by_type.values()
    )
