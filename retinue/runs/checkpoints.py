"""Checkpoints that a kill cannot hurt, and the way back to them."""

import logging
import os
import shutil
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

log = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames: a reader, or a run that starts again, never sees half a checkpoint.

    Raises:
        ValueError: the disk is full; the file that was there stays as it was.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        beside = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except (OSError, RuntimeError) as error:  # torch hides the system's reason in a RuntimeError
            beside.unlink(missing_ok=True)
            reason = (
                getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or "writing failed"
            )
            raise ValueError(f"could not save {path}: {reason}; the checkpoint before it is kept") from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return torch.load(path, map_location=map_location, weights_only=True)


class Checkpoints(Checkpoint):
    """Keeps `last.ckpt`, the one before it as `previous.ckpt`, and `best.ckpt` by a validation figure.

    Saves at the end of every epoch, every `every_steps` steps or `every_minutes` minutes within one, and when SIGTERM,
    Ctrl-C or SIGUSR2 (Slurm's time limit is near) asks the run to stop: then at the next optimiser step, or after a
    validation that is under way. A second signal ends the process at once, but not in a job of Slurm, which sends
    several and has SIGKILL for what takes too long.

    Args:
        folder: `<run>/checkpoints`.
        monitor: figure of which the highest is the best.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    CHECK_EVERY = 20  # steps between two looks at the other ranks: each look waits for the GPU

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
        # Set here, after Lightning's own, which lose the epoch; Lightning puts the former ones back when it ends.
        for number in self.SIGNALS:
            signal.signal(number, self._ask_to_stop)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        in_slurm = "SLURM_JOB_ID" in os.environ
        log.warning(
            "%s: saving at the next step, then stopping%s",
            signal.Signals(number).name,
            "" if in_slurm else "; a second one stops at once",
        )
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_IGN if in_slurm else signal.SIG_DFL)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.fit_loop._should_accumulate() or trainer.is_last_batch:
            return  # within a step there is nothing to go on from; the epoch's end saves by itself
        minutes = (time.monotonic() - self._saved_at) / 60
        due = self.every_minutes is not None and minutes >= self.every_minutes
        stop, due = self._agree(trainer, self._signal, due)
        if stop or due or (self.every_steps and trainer.global_step % self.every_steps == 0):
            self.save(trainer)
        if stop:
            self._stop(trainer, stop)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        score = pl_module.val_figures[self.monitor]
        better = score > self.best
        self.best = max(score, self.best)
        self.save(trainer, better)
        stop, _ = self._agree(trainer, self._signal, False, always=True)
        if stop:
            self._stop(trainer, stop)

    def save(self, trainer: pl.Trainer, best: bool = False) -> None:
        """Replace `last.ckpt`, and `best.ckpt` if it is the best; the former last one becomes `previous.ckpt`."""
        trainer.lightning_module.check_finite()  # pyright: ignore[reportCallIssue]
        last, new = self.folder / LAST, self.folder / f"new-{LAST}"
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            if best:  # first: a kill in between is made good by the epoch that the older `last.ckpt` repeats
                self._keep_as_best(new)
            if last.exists():
                os.replace(last, self.folder / PREVIOUS)
            os.replace(new, last)
        self._saved_at = time.monotonic()

    def _keep_as_best(self, new: Path) -> None:
        beside = self.folder / f"{BEST}.tmp"
        beside.unlink(missing_ok=True)
        try:
            os.link(new, beside)
        except OSError:  # a file system without hard links
            shutil.copyfile(new, beside)
        os.replace(beside, self.folder / BEST)

    def _agree(self, trainer: pl.Trainer, stop: int, due: bool, always: bool = False) -> tuple[int, bool]:
        """The same decision on all ranks."""
        if trainer.world_size == 1:
            return stop, due
        if not always and trainer.global_step % self.CHECK_EVERY:
            return 0, False
        flags = torch.tensor([stop, int(due)], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        return int(flags[0]), bool(flags[1])

    def _stop(self, trainer: pl.Trainer, number: int) -> None:
        name = signal.Signals(number).name
        raise Stopped(number, f"stopped by {name} at step {trainer.global_step}; the same command goes on from there")


def find_resume(folder: Path) -> tuple[Path | None, int]:
    """The newest checkpoint in `folder` that can be read, if any, and its step; a broken one is passed over.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    present = [path for name in (LAST, PREVIOUS, BEST) if (path := folder / name).exists()]
    for path in present:
        try:
            state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
            return path, state["global_step"]
        except Exception as error:
            log.warning("%s cannot be read (%s); trying the one before", path, str(error).splitlines()[0])
    if present:
        raise ValueError(f"none of the checkpoints in {folder} can be read; rerun=true starts anew")
    return None, 0
