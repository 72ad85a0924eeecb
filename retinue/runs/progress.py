"""Progress of a training run on the terminal, and the rows of its log."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingLog(Callback):
    """Log a row of running means every `log_every_n_steps` steps and at the end of an epoch, and show progress.

    On a terminal, progress is a bar with loss, accuracy, images/s and the time left; elsewhere it is a line for each
    epoch. Throughput includes waiting for data, but neither validation nor saving.

    Attributes:
        seconds: time spent on training steps, over all sessions of the run.
        images: images of these steps, over all devices.
    """

    def __init__(self) -> None:
        self.seconds, self.images = 0.0, 0
        # The same since the last logged row.
        self._window_seconds, self._window_images = 0.0, 0
        self._step_began = 0.0
        self._bar: Progress | None = None
        self._shown_at = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "images": self.images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.images = state_dict["seconds"], state_dict["images"]

    @property
    def images_per_second(self) -> float | None:
        return self.images / self.seconds if self.seconds else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"), TimeRemainingColumn(), TextColumn("left"),
                console=Console(stderr=True),
            )  # fmt: skip
            batches = int(trainer.num_training_batches)
            total = batches * (trainer.max_epochs or 1)
            done = trainer.current_epoch * batches + trainer.fit_loop.epoch_loop.batch_progress.current.ready
            self._bar.add_task("", total=total, completed=done, epoch="", figures="")
            self._bar.start()
        self._step_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch and trainer.strategy.root_device.type == "cuda":
            # The time of the steps that the GPU has not finished would otherwise count as validation.
            torch.cuda.synchronize()
        now = time.perf_counter()
        images = len(batch["index"]) * trainer.world_size
        self.seconds += now - self._step_began
        self.images += images
        self._window_seconds += now - self._step_began
        self._window_images += images
        self._step_began = now
        if self._bar:
            self._show(trainer, pl_module, now)
        stepped = not trainer.fit_loop._should_accumulate()
        if stepped and not trainer.is_last_batch and trainer.global_step % trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            self._log_row(trainer, pl_module, trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches)

    def _show(self, trainer: pl.Trainer, pl_module: pl.LightningModule, now: float) -> None:
        assert self._bar is not None
        bar, fields = self._bar.task_ids[0], {"epoch": f"{trainer.current_epoch + 1}/{trainer.max_epochs}"}
        # Show figures twice a second only, since reading them waits for the GPU.
        if now - self._shown_at > 0.5:
            self._shown_at = now
            rate = {"train/images_per_second": self._window_images / self._window_seconds}
            fields["figures"] = _line(pl_module.running_figures() | rate)  # pyright: ignore[reportCallIssue]
        self._bar.update(bar, advance=1, **fields)  # pyright: ignore[reportArgumentType]

    def _log_row(
        self, trainer: pl.Trainer, task: Any, epoch: float, figures: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        rate = self._window_images / self._window_seconds
        self._window_seconds, self._window_images = 0.0, 0
        row = {
            "epoch": round(epoch, 4),
            **task.pop_figures(),
            "train/lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),
            "train/images_per_second": rate,
            **(figures or {}),
        }
        for logger in trainer.loggers:
            logger.log_metrics(row, trainer.global_step)
        return row

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        row = self._log_row(trainer, pl_module, trainer.current_epoch + 1, pl_module.val_figures)
        if trainer.is_global_zero:
            line = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {_line(row)}"
            self._bar.console.print(line, highlight=False) if self._bar else print(line, file=sys.stderr, flush=True)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Validation and saving, which came before, are not training.
        self._step_began = time.perf_counter()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def _line(row: dict[str, float]) -> str:
    """Return a row as text, such as `loss 0.123  top1 0.95  val/top1 0.97  1,234 images/s`."""
    parts = [f"{name.removeprefix('train/')} {value:.4g}" for name, value in row.items()
             if name not in ("epoch", "train/images_per_second", "train/lr", "val/top5")]  # fmt: skip
    return "  ".join([*parts, f"{row['train/images_per_second']:,.0f} images/s"])
