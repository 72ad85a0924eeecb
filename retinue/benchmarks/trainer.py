"""Training steps per second under our trainer against a bare PyTorch loop that does the same work."""

import copy
import tempfile
import time
from collections import UserList
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

from retinue.benchmarks.timing import Row, Timing, make_row, synchronize
from retinue.runs.checkpoints import Checkpoints
from retinue.runs.config import register_resolvers
from retinue.runs.loggers import MetricsCSV
from retinue.runs.progress import TrainingLog
from retinue.runs.training import build_task, build_trainer, quiet_libraries, save_config
from retinue.tasks.optimization import create_optimizer, create_schedule
from retinue.utils.paths import CONF

DIFFERENT_BATCHES = 4
# Rounds at the start that are run and not counted.
WARMUP_ROUNDS = 2


class RandomBatches(pl.LightningDataModule):
    """An epoch that repeats a few random batches, which lie in the CPU's memory.

    Args:
        num_batches: batches of an epoch.
        batch_size: images of a batch.
        image_size: side of the images in pixels.
    """

    num_classes, in_chans = 10, 3

    def __init__(self, num_batches: int, batch_size: int, image_size: int):
        super().__init__()
        self.image_size = image_size
        batches = [
            {
                "image": torch.randn(batch_size, 3, image_size, image_size).to(memory_format=torch.channels_last),
                "label": torch.randint(self.num_classes, (batch_size,)),
                "index": torch.arange(batch_size),
                "seed": seed,
            }
            for seed in range(DIFFERENT_BATCHES)
        ]
        # Lightning would take a list for several loaders, but takes a UserList for one loader.
        self.batches = UserList(batches[i % len(batches)] for i in range(num_batches))

    def train_dataloader(self) -> UserList[dict]:
        return self.batches

    def val_dataloader(self) -> UserList[dict]:
        return self.batches[:1]


class BareLoop(pl.Callback):
    """Pause the trainer regularly and train a copy of its net on the same batches by a bare PyTorch loop.

    Attributes:
        steps: number of steps of a round: the trainer takes so many, then the bare loop does.
        trainer_seconds: mean seconds of a step of the trainer, for each round.
        bare_seconds: mean seconds of a step of the bare loop, for each round.
        net: the copy that the bare loop trains.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self.trainer_seconds: list[float] = []
        self.bare_seconds: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.net = copy.deepcopy(pl_module.model)
        self.batches = trainer.datamodule.batches  # pyright: ignore[reportAttributeAccessIssue]
        self.smoothing = pl_module.recipe["augment"]["label_smoothing"]
        self.optimizer = create_optimizer(self.net, pl_module.recipe)
        self.schedule = create_schedule(self.optimizer, pl_module.recipe, len(self.batches))
        self.device = pl_module.device
        self.resumed_at = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        completed = batch_idx + 1
        if completed % self.steps:
            return
        synchronize()
        paused_at = time.perf_counter()
        for i in range(completed - self.steps, completed):
            self.step(i)
        synchronize()
        now = time.perf_counter()
        self.trainer_seconds.append((paused_at - self.resumed_at) / self.steps)
        self.bare_seconds.append((now - paused_at) / self.steps)
        self.resumed_at = now

    def step(self, i: int) -> None:
        """Train the copy on batch i: transfer, forward, backward, optimiser and schedule."""
        image, label = (self.batches[i][key].to(self.device) for key in ("image", "label"))
        loss = F.cross_entropy(self.net(image), label, label_smoothing=self.smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step_update(i + 1)


def train_both(
    model: str, image_size: int, batch_size: int, device: torch.device, *, steps: int, rounds: int
) -> tuple[torch.nn.Module, BareLoop]:
    """Train a net of timm's for `rounds` x `steps` steps under our trainer and by the bare loop, in turn.

    Args:
        model: timm's name of the net.
        image_size: side of the images in pixels.
        batch_size: images of a batch.
        device: device of the training.
        steps: steps of a round.
        rounds: number of rounds.

    Returns:
        The net that our trainer trained, and the bare loop with the net that it trained.
    """
    register_resolvers()
    quiet_libraries()
    with initialize_config_dir(str(CONF), version_base="1.3"), tempfile.TemporaryDirectory() as folder:
        accelerator = "gpu" if device.type == "cuda" else "cpu"
        overrides = ["model=timm", f"model.name={model}", f"recipe.batch_size={batch_size}", "recipe.epochs=1"]
        overrides += ["recipe.ema.decay=null", f"run_dir={folder}", f"trainer.accelerator={accelerator}"]
        cfg = compose("train", overrides)
        torch.manual_seed(0)
        datamodule = RandomBatches(rounds * steps, batch_size, image_size)
        task, bare = build_task(cfg, datamodule), BareLoop(steps)
        callbacks = [bare, TrainingLog(), Checkpoints(Path(folder, "checkpoints"), "val/top1", **cfg.checkpoint)]
        trainer = build_trainer(cfg, callbacks=callbacks, logger=[MetricsCSV(Path(folder, "metrics.csv"), 0)])
        save_config(cfg, Path(folder))
        trainer.fit(task, datamodule=datamodule)
    return task.model, bare


def benchmark(
    model: str, image_size: int, batch_size: int, device: torch.device, *, steps: int = 10, rounds: int = 15
) -> list[Row]:
    """Measure a training step under our trainer and in the bare loop.

    Args:
        model: timm's name of the net.
        image_size: side of the images in pixels.
        batch_size: images of a batch.
        device: device of the training.
        steps: steps of a round.
        rounds: rounds that count; `WARMUP_ROUNDS` more precede them.

    Returns:
        A row for each side; `ratio` is relative to the bare loop.
    """
    _, bare = train_both(model, image_size, batch_size, device, steps=steps, rounds=rounds + WARMUP_ROUNDS)
    trainer_timing = Timing(tuple(bare.trainer_seconds[WARMUP_ROUNDS:]))
    bare_timing = Timing(tuple(bare.bare_seconds[WARMUP_ROUNDS:]))
    return [
        make_row(
            name,
            timing,
            against=("bare loop", bare_timing),
            shape=f"{batch_size}x3x{image_size}x{image_size}",
            dtype="float32",
            device=device,
            model=model,
            steps_per_s=1 / timing.median,
        )
        for name, timing in (("trainer", trainer_timing), ("bare loop", bare_timing))
    ]
