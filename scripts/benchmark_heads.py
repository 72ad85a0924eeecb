"""Multi-scale deformable attention, the op of DINO and Mask2Former: our form against mmcv's.

    python scripts/benchmark_heads.py device=cuda image_size=800x1333

The peer is mmcv's compiled kernel if one is installed and the device is a GPU, else mmcv's function in plain PyTorch,
which mmcv uses on the CPU. On a GPU, our plain form is measured beside our kernel. Shapes are those of DINO's encoder
and decoder: maps of strides 8 to 64, 8 heads of 32 channels, 4 points. Forward and backward are timed together, as in
training.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field

from retinue.benchmarks.heads import benchmark
from retinue.benchmarks.options import ImageSize, parse_image_size
from retinue.benchmarks.timing import pick_device, print_rows, write_csv
from retinue.utils import command_line
from retinue.utils.errors import user_errors


class Options(command_line.Options):
    """Options of this command."""

    image_size: ImageSize = Field("800x1333", description="height x width of the images in pixels")
    batch_size: int = Field(1, ge=1, description="images of a batch")
    rounds: int = Field(7, ge=1, description="how often each side is timed")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int = Field(default_factory=torch.get_num_threads, ge=1, description="threads of the CPU")
    out: Path | None = Field(None, description="CSV file to write")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    options = Options.parse(arguments)
    torch.set_num_threads(options.threads)
    device = str(pick_device(options.device))
    rows = benchmark(parse_image_size(options.image_size), options.batch_size, device, options.rounds)
    print_rows(rows)
    if options.out is not None:
        write_csv(options.out, rows)


if __name__ == "__main__":
    with user_errors():
        main()
