"""What a person sees of a training run, and the rows of its log."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingLog(Callback):
    """Logs a row of running means every `log_every_n_steps` steps and at the end of an epoch, and shows progress.

    On a terminal a bar with loss, accuracy, images/s and the time left; elsewhere a line an epoch. Throughput counts
    the waits for data, and neither validation nor saving.
    """

    def __init__(self) -> None:
        self.seconds, self.images = 0.0, 0  # of training, over all sessions of the run
        self._window_seconds, self._window_images = 0.0, 0
        self._began = 0.0
        self._bar: Progress | None = None
        self._shown = 0.0

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
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        images = len(batch["image"]) * trainer.world_size
        for name, amount in (("seconds", now - self._began), ("images", images)):
            setattr(self, name, getattr(self, name) + amount)
            setattr(self, f"_window_{name}", getattr(self, f"_window_{name}") + amount)
        self._began = now
        if self._bar:
            self._show(trainer, pl_module, now)
        stepped = not trainer.fit_loop._should_accumulate()
        if stepped and not trainer.is_last_batch and trainer.global_step % trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            self._log_row(trainer, pl_module, trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches)

    def _show(self, trainer: pl.Trainer, pl_module: pl.LightningModule, now: float) -> None:
        assert self._bar is not None
        bar, fields = self._bar.task_ids[0], {"epoch": f"{trainer.current_epoch + 1}/{trainer.max_epochs}"}
        if now - self._shown > 0.5:  # reading the figures waits for the GPU
            self._shown = now
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
        self._began = time.perf_counter()  # validation and saving are not training

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def _line(row: dict[str, float]) -> str:
    """`loss 0.123  top1 0.95  val/top1 0.97  1,234 images/s`."""
    parts = [f"{name.removeprefix('train/')} {value:.4g}" for name, value in row.items()
             if name not in ("epoch", "train/images_per_second", "train/lr", "val/top5")]  # fmt: skip
    return "  ".join([*parts, f"{row['train/images_per_second']:,.0f} images/s"])
