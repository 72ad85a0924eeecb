"""Our input pipeline against timm's with the same recipe, on the CPU.

    python scripts/benchmark_pipeline.py batch_size=64 out=pipeline.csv
    python scripts/benchmark_pipeline.py model=swin_tiny device=cuda dtype=bfloat16 batch_size=128 workers=16

Both sides read the same JPEG files and yield a normalised, erased and mixed float batch with soft targets; all of that
time counts. They run in one process without workers and in one thread, so that the rates are those of one core.

The recipe is DeiT's: random resized crop, flip, RandAugment (timm's code on both sides), random erasing, and MixUp or
CutMix. The images are noisy 500 x 375 crops of scikit-learn's two photos, in files of about 80 KB.

With `model`, the command says instead what limits a run of this net: the images/s that the input delivers, that the
training step takes, and that both reach together, and the number of cores whose input would keep up with the step.
`augment_device=gpu` and `decode=reduced` are the recipe's `augment.device` and `augment.decode`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from retinue.benchmarks.limits import measure, verdict
from retinue.benchmarks.options import Dtype
from retinue.benchmarks.pipeline import benchmark
from retinue.benchmarks.timing import pick_device, print_rows, write_csv
from retinue.utils import command_line
from retinue.utils.errors import user_errors


class Options(command_line.Options):
    """Options of this command."""

    image_size: int = Field(224, ge=1, description="side of the crops in pixels")
    batch_size: int = Field(64, ge=1, description="images of a batch")
    rounds: int = Field(25, ge=1, description="batches of each side that are timed")
    model: str | None = Field(None, description="timm's name of the net whose run is to be measured; null: none")
    device: str = Field("auto", description="device of this run: auto, cpu, cuda or cuda:N")
    dtype: Dtype = Field("float32", description="type of its computation: float32, or that of autocast")
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1, description="loading processes of this run")
    augment_device: Literal["gpu"] | None = Field(None, description="gpu: colours and shapes change on the device")
    decode: Literal["reduced"] | None = Field(None, description="reduced: JPEGs are decoded at a reduced scale")
    out: Path | None = Field(None, description="CSV file to write")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    options = Options.parse(arguments)
    if options.model is None:
        rows = benchmark(options.image_size, options.batch_size, options.rounds)
        print_rows(rows, "From JPEG files to mixed batches, on one core")
    else:
        rows = measure(
            options.model,
            pick_device(options.device),
            options.dtype,
            options.image_size,
            options.batch_size,
            workers=options.workers,
            batches=options.rounds,
            augment={"device": options.augment_device, "decode": options.decode},
        )
        print_rows(rows, "What a run needs and gets")
        print(verdict(rows))
    if options.out is not None:
        write_csv(options.out, rows)


if __name__ == "__main__":
    with user_errors():
        main()
