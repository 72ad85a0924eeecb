"""Our input pipeline against timm's with the same recipe, on the CPU.

    python scripts/benchmark_pipeline.py batch_size=64 out=pipeline.csv

Both sides read the same JPEG files and yield a normalised, erased and mixed float batch with soft targets; all of that
time counts. They run in one process without workers and in one thread, so that the rates are those of one core.

The recipe is DeiT's: random resized crop, flip, RandAugment (timm's code on both sides), random erasing, and MixUp or
CutMix. The images are noisy 500 x 375 crops of scikit-learn's two photos, in files of about 80 KB.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from retinue.benchmarks.pipeline import benchmark
from retinue.benchmarks.timing import print_rows, write_csv
from retinue.utils import command_line
from retinue.utils.errors import user_errors


class Options(command_line.Options):
    """Options of this command."""

    image_size: int = Field(224, ge=1, description="side of the crops in pixels")
    batch_size: int = Field(64, ge=1, description="images of a batch")
    rounds: int = Field(25, ge=1, description="batches of each side that are timed")
    out: Path | None = Field(None, description="CSV file to write")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    options = Options.parse(arguments)
    rows = benchmark(options.image_size, options.batch_size, options.rounds)
    print_rows(rows, "From JPEG files to mixed batches, on one core")
    if options.out is not None:
        write_csv(options.out, rows)


if __name__ == "__main__":
    with user_errors():
        main()
