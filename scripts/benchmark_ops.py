"""Speed and memory of attention against named peers: primitives in the layers of nets, whole ops, and whole nets.

    python scripts/benchmark_ops.py                                           # everything that fits the machine
    python scripts/benchmark_ops.py ops=[window,bilevel_routing,agent] image_sizes=[224,512,1024]
    python scripts/benchmark_ops.py ops=routed_attention image_sizes=800x1333 dtype=float16 out=ops.csv plot=ops.png
    python scripts/benchmark_ops.py models=[biformer_small,swin_tiny]
    python scripts/benchmark_ops.py tune=true ops=window_attention            # tiles of the Triton kernels

A primitive (routed_attention, window_attention, neighborhood_attention, linear_attention) is measured in the layers of
BiFormer-S, Swin-T, NAT-M and L2ViT-T, and summed over these layers; an op as the second block of a first stage with 64
channels; a net with 224 x 224 pixels, with the attention of its ops replaced. All formulations of a table are timed in
turn, forward and forward + backward. `ratio` is the speed relative to the formulation in `against`. `error` is the
largest error of output and gradients, against float64, relative to that of plain PyTorch in the same type. The command
ends if the error of our formulation is more than 2; a peer is left out if its error is more than 4. On a GPU, `floor`
is a lower bound as a fraction of the time: the bytes and FLOPs that a fused form needs, at the rates of copying and of
matrix products that are measured at the start. Peak memory is measured on GPUs (of a primitive without its inputs), of
nets also on the CPU. With two image sizes of 512 x 512 pixels or more, time and memory are fitted as powers of the
number of tokens.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field

from retinue.benchmarks import growth, ops, tuning
from retinue.benchmarks.options import Dtype, ImageSize, parse_image_size
from retinue.benchmarks.timing import Row, pick_device, print_rows, write_csv
from retinue.utils import command_line
from retinue.utils.errors import user_errors

CSV_ONLY_COLUMNS = ("series", "batch", "pixels")


class Options(command_line.Options):
    """Options of this command; what is null is chosen to fit the device and the other options."""

    ops: list[str] | None = Field(None, description="primitives and ops; by default all, or none if models are given")
    models: list[str] | None = Field(None, description="nets; by default some, or none if ops are given")
    image_sizes: list[ImageSize] | None = Field(
        None, description="sizes of the images, such as 224 or 800x1333; by default 224, on a GPU also larger"
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="images of a batch; by default 128 on a GPU, 4 if they are large; on the CPU 1, 8 of nets",
    )
    dtype: Dtype | None = Field(
        None, description="type of the computation; by default bfloat16 on a GPU, float32 on the CPU"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    rounds: int | None = Field(
        None, ge=1, description="how often each formulation is timed; by default 20 times on a GPU, 5 on the CPU"
    )
    threads: int = Field(2, ge=1, description="threads of the CPU")
    tune: bool = Field(False, description="search for the fastest tiles of the Triton kernels, and print them")
    out: Path | None = Field(None, description="CSV file to write")
    plot: Path | None = Field(None, description="PNG file to write: time against pixels")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    options = Options.parse(arguments)
    torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    cuda = device.type == "cuda"
    image_sizes = None if options.image_sizes is None else [parse_image_size(text) for text in options.image_sizes]
    plan = ops.make_plan(options.ops, options.models, image_sizes, options.batch_size, cuda, options.tune)
    if options.tune and not cuda:
        raise ValueError("tune=true needs a CUDA device")
    setting = ops.make_setting(device, options.dtype, options.rounds)
    if options.tune:
        tuning.tune_all(plan.primitives, plan.batches, getattr(torch, setting.dtype), device)
        return
    rows: list[Row] = []
    try:
        for title, table in ops.measure_tables(plan, setting):
            if table:
                shown = [{key: row[key] for key in row if key not in CSV_ONLY_COLUMNS} for row in table]
                print_rows(shown, title)
            rows += table
    finally:
        # After an error, what was measured before is still written.
        if fitted := growth.exponents(rows):
            print_rows(fitted, "cost as a power of the number of tokens")
        if options.out is not None and rows:
            write_csv(options.out, rows)
        if options.plot is not None and rows:
            growth.plot(options.plot, rows)


if __name__ == "__main__":
    with user_errors():
        main()
