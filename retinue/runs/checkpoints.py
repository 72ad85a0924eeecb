"""Checkpoints that survive a kill at any moment, and the search for the newest one to resume from."""

import logging
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities import rank_zero_only
from safetensors.torch import save_file

from models.merging import contiguous, mean, read_state
from retinue.runs.ema import EMA
from retinue.runs.replacement import discard
from retinue.runs.result_file import CONFIG
from retinue.utils.errors import SAME_REQUEST, Stopped
from retinue.utils.files import link_or_copy, remove_temporaries, replacing

log = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
# Mean of the best epochs' weights, which is tested with recipe.average_best.
AVERAGE = "average.safetensors"
# Keys of every checkpoint from which a run goes on.
WHOLE = {"state_dict", "global_step", "epoch", "optimizer_states", "lr_schedulers", "loops", "callbacks"}
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

    With `top_k`, the checkpoints of the `top_k` best epochs are kept too, as `epoch-0012.ckpt` and the like.

    A checkpoint is saved at the end of every epoch; within an epoch every `every_steps` steps and every
    `every_minutes` minutes; and when SIGTERM, Ctrl-C or SIGUSR2 (Slurm's time limit is near) asks the run to stop. The
    run then saves at the next optimiser step, or after a validation that is under way. A signal that comes more than
    `SAME_REQUEST` seconds after the first one ends the process at once, except in a Slurm job: Slurm sends several
    signals, and SIGKILL to a job that takes too long.

    Args:
        folder: `<run>/checkpoints`.
        monitor: name of the figure, such as `val/top1`; its highest value is the best, of `val/loss` the lowest.
        every_minutes: minutes between two checkpoints within an epoch; None for no limit.
        every_steps: optimiser steps between two checkpoints within an epoch; None for no limit.
        top_k: number of best epochs whose checkpoints are kept; None keeps the best one only, as `best.ckpt`.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    # Optimiser steps after which the ranks agree on whether to save or stop. Each agreement waits for the GPU.
    AGREE_EVERY = 20

    def __init__(
        self,
        folder: Path,
        monitor: str,
        every_minutes: float | None = None,
        every_steps: int | None = None,
        top_k: int | None = None,
    ):
        self.folder, self.monitor = folder, monitor
        self.every_minutes, self.every_steps, self.top_k = every_minutes, every_steps, top_k
        self.best = float("-inf")
        # Figure of each epoch whose checkpoint is kept, by the number of epochs that were finished.
        self.kept: dict[int, float] = {}
        self._saved_at = time.monotonic()
        self._signal, self._asked_at = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "kept": self.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        # Checkpoints of before `top_k` have no such entry.
        self.kept = state_dict.get("kept", {})

    @property
    def best_epochs(self) -> list[int]:
        """The kept epochs from the best to the worst; of epochs with equal figures the earlier one is better."""
        return sorted(self.kept, key=lambda epoch: (-self.kept[epoch], epoch))

    def path_of(self, epoch: int) -> Path:
        """Return the path of the checkpoint of a kept epoch."""
        return self.folder / f"epoch-{epoch:04}.ckpt"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            remove_temporaries(self.folder, ".ckpt")
        # Set the handlers after Lightning has set its own, which lose the epoch. Lightning restores the handlers that
        # it found when the training ends.
        for number in self.SIGNALS:
            signal.signal(number, self._ask_to_stop)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        in_slurm = "SLURM_JOB_ID" in os.environ
        if self._signal:
            if not in_slurm and time.monotonic() - self._asked_at > SAME_REQUEST:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._signal, self._asked_at = number, time.monotonic()
        hint = "" if in_slurm else "; a second signal stops at once"
        log.warning("%s: saving at the next step, then stopping%s", signal.Signals(number).name, hint)

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
        # With recipe.val_every, an epoch without a validation has no figures.
        sign = -1 if self.monitor == "val/loss" else 1
        score = sign * pl_module.val_figures.get(self.monitor, -sign * math.inf)
        # A net without a finite figure or loss is never the best; max() would keep a NaN for good.
        is_finite = math.isfinite(score) and math.isfinite(pl_module.val_figures.get("val/loss", 0.0))
        is_best = is_finite and score > self.best
        self.best = score if is_best else self.best
        if self.top_k is not None and is_finite:
            self.kept[trainer.current_epoch + 1] = score
            self.kept = {epoch: self.kept[epoch] for epoch in self.best_epochs[: self.top_k]}
        self.save(trainer, is_best)
        stop, _ = self._agree(trainer, self._signal, False, always=True)
        if stop:
            self._stop(trainer, stop)

    def save(self, trainer: pl.Trainer, is_best: bool = False) -> None:
        """Write `last.ckpt`, and `best.ckpt` if `is_best`; the old `last.ckpt` becomes `previous.ckpt`.

        Raises:
            ValueError: the loss, a weight, a buffer or their average is not finite, the run's folder was removed, or
                the file cannot be written.
        """
        trainer.lightning_module.check_finite()  # pyright: ignore[reportCallIssue]
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, EMA):
                callback.check_finite()
        run = self.folder.parent
        if trainer.is_global_zero and not (run / CONFIG).exists():
            raise ValueError(f"{run / CONFIG} was removed while the run was under way; start the same command again")
        last, new = self.folder / LAST, self.folder / NEW
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            if is_best:
                # Write best.ckpt first: after a kill in between, the older last.ckpt repeats the epoch and rewrites it.
                link_or_copy(new, self.folder / BEST)
            if trainer.current_epoch + 1 in self.kept:
                link_or_copy(new, self.path_of(trainer.current_epoch + 1))
            if last.exists():
                os.replace(last, self.folder / PREVIOUS)
            os.replace(new, last)
            for path in self.folder.glob("epoch-*.ckpt"):
                if path not in map(self.path_of, self.kept):
                    path.unlink()
            discard(run)
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


def weights_to_test(checkpoints: Checkpoints, averaged: Sequence[int]) -> Path | dict[str, torch.Tensor]:
    """Return the mean of the weights of the epochs `averaged`, which is also written, or the path of the best ones."""
    folder = checkpoints.folder
    if not averaged:
        return folder / BEST if (folder / BEST).exists() else folder / LAST
    state = mean(read_state(checkpoints.path_of(epoch)) for epoch in averaged)
    if rank_zero_only.rank == 0:
        with replacing(folder / AVERAGE) as path:
            save_file(contiguous(state), path)
    return state


def find_resume(folder: Path, expected: Mapping[str, torch.Tensor] | None = None) -> tuple[Path | None, int]:
    """Return the newest readable checkpoint in `folder` and its step, or (None, 0) if there are no checkpoints.

    Args:
        folder: `<run>/checkpoints`.
        expected: state dict of the run's task; a checkpoint with other names or shapes is another net's. With None any
            checkpoint that tells its step is accepted.

    Raises:
        ValueError: there are checkpoints, but none of them can be read or is this run's.
    """
    paths = [path for name in (LAST, PREVIOUS, BEST) if (path := folder / name).exists()]
    for path in paths:
        try:
            state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
            step = state["global_step"] if isinstance(state, dict) and "global_step" in state else None
            if step is None or (expected is not None and not state.keys() >= WHOLE):
                raise ValueError("it is no checkpoint of a run")
            if expected is not None and _shapes(state["state_dict"]) != _shapes(expected):
                raise ValueError("it is the checkpoint of another net")
            return path, step
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("%s cannot be read (%s); trying the one before", path, reason)
    if paths:
        raise ValueError(f"none of the checkpoints in {folder} can be read; rerun=true starts anew")
    return None, 0


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}
