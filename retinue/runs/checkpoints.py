"""Checkpoints that survive a kill at any moment, and the search for the newest one to resume from."""

import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from retinue.utils.errors import Stopped
from retinue.utils.files import link_or_copy, remove_temporaries, replacing

log = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
# A complete checkpoint that has not been renamed to LAST yet.
NEW = "new-last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints whole or not at all, so that no reader and no resumed run ever sees half a checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Raises:
            ValueError: the file cannot be written, for example because the disk is full. An existing file at `path`
                stays as it was.
        """
        try:
            with replacing(path, durable=True) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch raises a RuntimeError and hides the system's reason in its context.
            causes = (error, error.__context__)
            reasons = [cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror]
            reason = reasons[0] if reasons else "writing failed"
            raise ValueError(f"could not save {path}: {reason}; the checkpoint before it is kept") from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Load a checkpoint without executing code from it, whatever `weights_only` says."""
        return torch.load(path, map_location=map_location, weights_only=True)


class Checkpoints(Checkpoint):
    """Keep `last.ckpt`, the checkpoint before it as `previous.ckpt`, and `best.ckpt` by a validation figure.

    A checkpoint is saved at the end of every epoch; within an epoch every `every_steps` steps and every
    `every_minutes` minutes; and when SIGTERM, Ctrl-C or SIGUSR2 (Slurm's time limit is near) asks the run to stop. The
    run then saves at the next optimiser step, or after a validation that is under way. A second signal ends the process
    at once, except in a Slurm job: Slurm sends several signals, and SIGKILL to a job that takes too long.

    Args:
        folder: `<run>/checkpoints`.
        monitor: name of the figure, such as `val/top1`; its highest value is the best.
        every_minutes: minutes between two checkpoints within an epoch; None for no limit.
        every_steps: optimiser steps between two checkpoints within an epoch; None for no limit.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    # Optimiser steps after which the ranks agree on whether to save or stop. Each agreement waits for the GPU.
    AGREE_EVERY = 20

    def __init__(self, folder: Path, monitor: str, every_minutes: float | None = None, every_steps: int | None = None):
        self.folder, self.monitor = folder, monitor
        self.every_minutes, self.every_steps = every_minutes, every_steps
        self.best = float("-inf")
        self._saved_at = time.monotonic()
        self._signal = 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            remove_temporaries(self.folder, ".ckpt")
        # Set the handlers after Lightning has set its own, which lose the epoch. Lightning restores the handlers that
        # it found when the training ends.
        for number in self.SIGNALS:
            signal.signal(number, self._ask_to_stop)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        in_slurm = "SLURM_JOB_ID" in os.environ
        hint = "" if in_slurm else "; a second signal stops at once"
        log.warning("%s: saving at the next step, then stopping%s", signal.Signals(number).name, hint)
        for other in self.SIGNALS:
            signal.signal(other, signal.SIG_IGN if in_slurm else signal.SIG_DFL)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        # Between the accumulated batches of a step there is no state to resume from; the end of an epoch saves anyway.
        if trainer.fit_loop._should_accumulate() or trainer.is_last_batch:
            return
        minutes = (time.monotonic() - self._saved_at) / 60
        due = self.every_minutes is not None and minutes >= self.every_minutes
        stop, due = self._agree(trainer, self._signal, due)
        if stop or due or (self.every_steps and trainer.global_step % self.every_steps == 0):
            self.save(trainer)
        if stop:
            self._stop(trainer, stop)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        score = pl_module.val_figures[self.monitor]
        is_best = score > self.best
        self.best = max(score, self.best)
        self.save(trainer, is_best)
        stop, _ = self._agree(trainer, self._signal, False, always=True)
        if stop:
            self._stop(trainer, stop)

    def save(self, trainer: pl.Trainer, is_best: bool = False) -> None:
        """Write `last.ckpt`, and `best.ckpt` if `is_best`; the old `last.ckpt` becomes `previous.ckpt`.

        Raises:
            ValueError: the loss is not finite, or the file cannot be written.
        """
        trainer.lightning_module.check_finite()  # pyright: ignore[reportCallIssue]
        last, new = self.folder / LAST, self.folder / NEW
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            if is_best:
                # Write best.ckpt first: after a kill in between, the older last.ckpt repeats the epoch and rewrites it.
                link_or_copy(new, self.folder / BEST)
            if last.exists():
                os.replace(last, self.folder / PREVIOUS)
            os.replace(new, last)
        self._saved_at = time.monotonic()

    def _agree(self, trainer: pl.Trainer, stop: int, due: bool, always: bool = False) -> tuple[int, bool]:
        """Return the signal to stop for (0: none) and whether to save, the same on all ranks.

        Args:
            trainer: the trainer of this rank.
            stop: signal that this rank has received, or 0.
            due: whether this rank's clock says that a checkpoint is due.
            always: agree now, and not only every `AGREE_EVERY` steps.
        """
        if trainer.world_size == 1:
            return stop, due
        if not always and trainer.global_step % self.AGREE_EVERY:
            return 0, False
        flags = torch.tensor([stop, int(due)], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        return int(flags[0]), bool(flags[1])

    def _stop(self, trainer: pl.Trainer, number: int) -> None:
        name = signal.Signals(number).name
        raise Stopped(number, f"stopped by {name} at step {trainer.global_step}; the same command goes on from there")


def find_resume(folder: Path) -> tuple[Path | None, int]:
    """Return the newest readable checkpoint in `folder` and its step, or (None, 0) if there are no checkpoints.

    Raises:
        ValueError: there are checkpoints, but none of them can be read.
    """
    paths = [path for name in (LAST, PREVIOUS, BEST) if (path := folder / name).exists()]
    for path in paths:
        try:
            state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
            return path, state["global_step"]
        except Exception as error:
            log.warning("%s cannot be read (%s); trying the one before", path, str(error).splitlines()[0])
    if paths:
        raise ValueError(f"none of the checkpoints in {folder} can be read; rerun=true starts anew")
    return None, 0
