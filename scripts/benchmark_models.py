"""Parameters, MACs, speed and memory of models, ours and timm's.

    python scripts/benchmark_models.py models=[biformer_tiny,swin_tiny,resnet50] batch_size=8 against=resnet50
    python scripts/benchmark_models.py models=swin_tiny peers=true forms=[eager,compiled,graph] batch_size=128
    python scripts/benchmark_models.py models=swin_* batch_sizes=[1,8,64] latency=true parts=true out=swin.csv

All models are timed in turn in one process. Inference is a forward pass in evaluation mode; training is forward,
cross-entropy, backward and a step of AdamW, which is fused on a GPU. Weights and images are random and lie on the
device. On a GPU, peak memory is the memory that PyTorch's allocator held for tensors; on the CPU, it is how much the
process grew. `ready_s` is the time until a model had run twice, with compiling.

`models=swin_*` takes all models that match, ours and timm's, without those that do not take `image_size`. Of more than
eight models, eight at a time are timed in turn, each time with that of `against`.

`batch_sizes`, `latency` and `parts` add rows of models that are measured one at a time, which the column `mode` names:
throughput and training throughput for each batch size, where a batch that does not fit in memory is halved; latency,
with the 99th percentile `p99_ms`, of single images; and forward, backward and optimizer of a training step.

Forms: eager; compiled, as with `task.compile=true`; whole, compiled as a whole even if the blocks are alike;
reduce-overhead, as with `task.compile=reduce-overhead`; graph, an eager step in one CUDA graph. The last two are for
GPUs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from retinue.benchmarks.model_steps import Setting
from retinue.benchmarks.models import benchmark, expand, plot, with_peers
from retinue.benchmarks.nets import OURS
from retinue.benchmarks.options import Dtype, Form
from retinue.benchmarks.single import measure_alone
from retinue.benchmarks.timing import pick_device, print_rows, write_csv
from retinue.utils import command_line
from retinue.utils.errors import user_errors


class Options(command_line.Options):
    """Options of this command."""

    models: list[str] = Field(
        ["biformer_tiny", "swin_tiny", "resnet50"],
        min_length=1,
        description="names of models, ours and timm's; swin_* works",
    )
    against: str | None = Field(None, description="model that the column `ratio` (speed) is relative to")
    image_size: int = Field(224, ge=1, description="side of the images in pixels")
    batch_size: int = Field(8, ge=1, description="images of a batch")
    train: bool = Field(True, description="measure training, too")
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="measure the throughput of these batches, too"
    )
    latency: bool = Field(False, description="measure the latency of single images, too")
    parts: bool = Field(False, description="measure forward, backward and optimizer apart, too")
    energy: bool = Field(False, description="measure the joules of an image on a GPU (extra energy)")
    rounds: int = Field(7, ge=1, description="how often each model is timed")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Dtype = Field("float32", description="float32, or the type of autocast")
    channels_last: bool = Field(False, description="use the channels-last memory format")
    forms: list[Form] = Field(["eager"], min_length=1, description="how the models run; ratios are within one form")
    peers: bool = Field(False, description="measure also the nets with the attention of others, and timm's nets")
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
    )
    names = expand(options.models)
    named = with_peers(names, setting) if options.peers else {name: (name, OURS) for name in names}
    models = {row: {"name": name} for row, (name, _) in named.items()}
    shared = {
        "train": options.train,
        "rounds": options.rounds,
        "forms": options.forms,
        "formulations": {row: formulation for row, (_, formulation) in named.items()},
        "may_fail": set(names) - set(options.models),
        "energy": options.energy,
    }
    rows = compared = benchmark(models, setting, against=options.against, **shared)
    if options.batch_sizes or options.latency or options.parts:
        measures = {"batch_sizes": options.batch_sizes, "latency": options.latency, "parts": options.parts}
        rows = compared + measure_alone(models, setting, **measures, **shared)
    if not rows:
        raise ValueError(f"none of the models takes images of {options.image_size} pixels")
    print_rows(rows)
    if options.out is not None:
        write_csv(options.out, rows)
    if options.plot is not None:
        plot(options.plot, compared)


if __name__ == "__main__":
    with user_errors():
        main()
