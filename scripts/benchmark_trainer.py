"""Training steps per second under our trainer against a bare PyTorch loop that does the same work.

    python scripts/benchmark_trainer.py model=resnet18 image_size=64 batch_size=32

One run of our trainer, with its log, checkpoints and progress, pauses every few steps for the bare loop, which trains a
copy of the net on the same batches with the same optimiser and schedule, and does nothing else. So both are timed in
turn. Batches are random and lie in memory. Validation and the checkpoint at the end are not counted. `ratio` is the
trainer's speed relative to the bare loop.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field

from retinue.benchmarks.timing import pick_device, print_rows, write_csv
from retinue.benchmarks.trainer import benchmark
from retinue.utils import command_line
from retinue.utils.errors import user_errors


class Options(command_line.Options):
    """Options of this command."""

    model: str = Field("resnet18", description="timm's name of the net")
    image_size: int = Field(64, ge=1, description="side of the images in pixels")
    batch_size: int = Field(32, ge=1, description="images of a batch")
    steps: int = Field(10, ge=1, description="steps of a round")
    rounds: int = Field(15, ge=1, description="how often each side is timed")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int = Field(default_factory=torch.get_num_threads, ge=1, description="threads of the CPU")
    out: Path | None = Field(None, description="CSV file to write")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    options = Options.parse(arguments)
    torch.set_num_threads(options.threads)
    rows = benchmark(
        options.model,
        options.image_size,
        options.batch_size,
        pick_device(options.device),
        steps=options.steps,
        rounds=options.rounds,
    )
    print_rows(rows)
    if options.out is not None:
        write_csv(options.out, rows)


if __name__ == "__main__":
    with user_errors():
        main()
