"""Training steps/s under our trainer against a bare PyTorch loop that does the same work.

    python scripts/benchmark_trainer.py --model resnet18 --img-size 64 --batch-size 32

One run of our trainer, with its log, checkpoints and progress, stops every few steps for the bare loop, which takes the
same batches, from memory, with the same optimiser and schedule, and no more. So the two are timed in turn. Validation
and the checkpoint at the end are not counted. `ratio` is the trainer's speed over the bare loop's.
"""

import argparse
import copy
import tempfile
import time
from collections import UserList
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

from retinue.benchmarks.timing import Row, Timing, make_row, pick_device, print_rows, synchronize, write_csv
from retinue.runs.checkpoints import Checkpoints
from retinue.runs.config import register_resolvers
from retinue.runs.loggers import MetricsCSV
from retinue.runs.progress import TrainingLog
from retinue.runs.training import build_task, build_trainer, quiet_libraries
from retinue.tasks.optimization import create_optimizer, create_schedule
from retinue.utils.errors import user_errors
from retinue.utils.paths import CONF


class RandomBatches(pl.LightningDataModule):
    """`num_batches` batches of a few random ones, on the CPU and ready for the net."""

    num_classes, in_chans = 10, 3

    def __init__(self, num_batches: int, batch_size: int, image_size: int):
        super().__init__()
        self.image_size = image_size
        few = [
            {
                "image": torch.randn(batch_size, 3, image_size, image_size).to(memory_format=torch.channels_last),
                "label": torch.randint(self.num_classes, (batch_size,)),
                "index": torch.arange(batch_size),
                "seed": seed,
            }
            for seed in range(4)
        ]
        # Not a list: Lightning would take that for several loaders.
        self.batches = UserList(few[i % len(few)] for i in range(num_batches))

    def train_dataloader(self) -> UserList[dict]:
        return self.batches

    def val_dataloader(self) -> UserList[dict]:
        return self.batches[:1]


class BareLoop(pl.Callback):
    """Every `steps` steps of the trainer, as many of its own, on a copy of the net and the same batches."""

    def __init__(self, steps: int):
        self.steps = steps
        self.trainer_seconds: list[float] = []  # a step, one figure a round
        self.bare_seconds: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.net = copy.deepcopy(pl_module.model)
        self.batches = trainer.datamodule.batches  # pyright: ignore[reportAttributeAccessIssue]
        self.smoothing = pl_module.recipe["augment"]["label_smoothing"]
        self.optimizer = create_optimizer(self.net, pl_module.recipe)
        self.schedule = create_schedule(self.optimizer, pl_module.recipe, len(self.batches))
        self.device = pl_module.device
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        done = batch_idx + 1
        if done % self.steps:
            return
        synchronize()
        paused = time.perf_counter()
        for i in range(done - self.steps, done):
            self.step(i)
        synchronize()
        now = time.perf_counter()
        self.trainer_seconds.append((paused - self.began) / self.steps)
        self.bare_seconds.append((now - paused) / self.steps)
        self.began = now

    def step(self, i: int) -> None:
        image, label = (self.batches[i][key].to(self.device) for key in ("image", "label"))
        loss = F.cross_entropy(self.net(image), label, label_smoothing=self.smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step_update(i + 1)


def train_both(
    model: str, img_size: int, batch_size: int, device: torch.device, *, steps: int, rounds: int
) -> tuple[torch.nn.Module, BareLoop]:
    """The net that the trainer trained for `rounds` x `steps` steps, and the bare loop with its own."""
    register_resolvers()
    quiet_libraries()
    with initialize_config_dir(str(CONF), version_base="1.3"), tempfile.TemporaryDirectory() as folder:
        accelerator = "gpu" if device.type == "cuda" else "cpu"
        overrides = ["model=timm", f"model.name={model}", f"recipe.batch_size={batch_size}", "recipe.epochs=1"]
        overrides += ["recipe.ema.decay=null", f"run_dir={folder}", f"trainer.accelerator={accelerator}"]
        cfg = compose("train", overrides)
        torch.manual_seed(0)
        datamodule = RandomBatches(rounds * steps, batch_size, img_size)
        task, bare = build_task(cfg, datamodule), BareLoop(steps)
        callbacks = [bare, TrainingLog(), Checkpoints(Path(folder, "checkpoints"), "val/top1", **cfg.checkpoint)]
        trainer = build_trainer(cfg, callbacks=callbacks, logger=[MetricsCSV(Path(folder, "metrics.csv"), 0)])
        trainer.fit(task, datamodule=datamodule)
    return task.model, bare


def benchmark(
    model: str, img_size: int, batch_size: int, device: torch.device, *, steps: int = 10, rounds: int = 15
) -> list[Row]:
    """Two rows, of milliseconds a step; two rounds more are run and not counted."""
    _, bare = train_both(model, img_size, batch_size, device, steps=steps, rounds=rounds + 2)
    ours, theirs = Timing(tuple(bare.trainer_seconds[2:])), Timing(tuple(bare.bare_seconds[2:]))
    return [
        make_row(
            what,
            timing,
            against=("bare loop", theirs),
            shape=f"{batch_size}x3x{img_size}x{img_size}",
            dtype="float32",
            device=device,
            model=model,
            steps_per_s=1 / timing.median,
        )
        for what, timing in (("trainer", ours), ("bare loop", theirs))
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Compare our trainer with a bare PyTorch loop.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="resnet18", metavar="NAME", help="of timm")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="in a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    rows = benchmark(args.model, args.img_size, args.batch_size, device, steps=args.steps, rounds=args.rounds)
    print_rows(rows)
    if args.csv:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    with user_errors():
        main()
