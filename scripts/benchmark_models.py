"""Parameters, MACs, speed and memory of models, ours and timm's.

    python scripts/benchmark_models.py models=[biformer_tiny,swin_tiny,resnet50] batch_size=8 against=resnet50

All models are timed in turn in one process. Inference is a forward pass in evaluation mode; training is forward,
cross-entropy, backward and a step of AdamW. Weights and images are random and lie on the device. On a GPU, peak memory
is the memory that PyTorch's allocator held for tensors; on the CPU, it is how much the process grew.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field

from retinue.benchmarks.models import Setting, benchmark, plot
from retinue.benchmarks.options import Dtype
from retinue.benchmarks.timing import pick_device, print_rows, write_csv
from retinue.utils import command_line
from retinue.utils.errors import user_errors


class Options(command_line.Options):
    """Options of this command."""

    models: list[str] = Field(
        ["biformer_tiny", "swin_tiny", "resnet50"], min_length=1, description="names of models, ours and timm's"
    )
    against: str | None = Field(None, description="model that the column `ratio` (speed) is relative to")
    image_size: int = Field(224, ge=1, description="side of the images in pixels")
    batch_size: int = Field(8, ge=1, description="images of a batch")
    train: bool = Field(True, description="measure training, too")
    rounds: int = Field(7, ge=1, description="how often each model is timed")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Dtype = Field("float32", description="float32, or the type of autocast")
    channels_last: bool = Field(False, description="use the channels-last memory format")
    compile: bool = Field(False, description="use torch.compile")
    threads: int = Field(default_factory=torch.get_num_threads, ge=1, description="threads of the CPU")
    out: Path | None = Field(None, description="CSV file to write")
    plot: Path | None = Field(None, description="PNG file to write: images/s against MACs")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    options = Options.parse(arguments)
    torch.set_num_threads(options.threads)
    setting = Setting(
        options.image_size,
        options.batch_size,
        str(pick_device(options.device)),
        options.dtype,
        options.channels_last,
        options.compile,
    )
    models = {name: {"name": name} for name in options.models}
    rows = benchmark(models, setting, train=options.train, rounds=options.rounds, against=options.against)
    print_rows(rows)
    if options.out is not None:
        write_csv(options.out, rows)
    if options.plot is not None:
        plot(options.plot, rows)


if __name__ == "__main__":
    with user_errors():
        main()
