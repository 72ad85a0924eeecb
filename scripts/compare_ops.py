"""Compare attention ops in one backbone, with the same recipe and seeds: accuracy, size, speed and memory.

    python scripts/compare_ops.py small=true                       # all ops on the digits, in a quarter of an hour
    python scripts/compare_ops.py ops=[window,agent] seeds=[0,1,2] data=cifar10 recipe.epochs=50
    python scripts/compare_ops.py image_sizes=[224,512] model.size=tiny data=imagenet data.root=/data/in1k

All other keys are for train.py. The runs are those of `train.py model=swin model.mixers=<op> seed=<seed> ...`, in the
same folders: a finished run is not repeated, a stopped run is resumed, and the runs of a sweep (`train.py -m ...`) are
used as they are. An op that fails has its reason in the table, and the other ops go on. Afterwards speed and memory are
measured, all ops in turn in one process.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from timm.layers import to_2tuple

from models import model_name
from ops import list_ops
from retinue.benchmarks.timing import describe_device, pick_device, print_rows, write_csv
from retinue.results.compare_ops import SMALL, check_ops, measure_ops, plot_ops, train_ops
from retinue.runs.config import register_resolvers
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from retinue.utils.paths import CONF


class Options(command_line.Options):
    ops: list[str] | None = Field(None, min_length=1, description="ops to compare; null: all")
    backbone: str = Field("swin", description="backbone in conf/model that takes mixers")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="seeds of the runs")
    small: bool = Field(False, description=f"short runs: {' '.join(SMALL)}")
    image_sizes: list[int] | None = Field(
        None, min_length=1, description="image sizes of the measurement, px; null: the data's own"
    )
    batch_size: int = Field(32, ge=1, description="images in a batch of the measurement")
    rounds: int = Field(5, ge=1, description="how often each net is timed")
    device: str = Field("auto", description="device of the measurement: auto, cpu, cuda or cuda:N")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="type of the measurement")
    folder: Path = Field(Path("outputs"), description="folder of the runs")
    out: Path = Field(Path("compare_ops"), description="folder of the table and the plot")


def main(arguments: Sequence[str] | None = None) -> None:
    options, overrides = Options.parse_some(arguments)
    ops = list_ops() if options.ops is None else options.ops
    check_ops(ops)
    device = pick_device(options.device)
    if options.small:
        overrides = [*SMALL, *overrides]

    register_resolvers()
    rows, nets, cfg = train_ops(options.backbone, ops, options.seeds, overrides, options.folder)
    image_sizes = options.image_sizes
    if image_sizes is None:
        image_sizes = [int(max(to_2tuple(cfg.data.image_size)))]
    for size in image_sizes:
        columns = measure_ops(nets, size, options.batch_size, str(device), options.dtype, options.rounds)
        rows = [{**row, **columns.get(str(row["what"]), {})} for row in rows]
    rows.sort(key=lambda row: -1 if row["top1"] is None else row["top1"], reverse=True)
    net = model_name(cfg.model, cfg.data.image_size)
    run = f"{net} on {cfg.data.name}, {cfg.recipe.epochs} epochs, {len(options.seeds)} seeds"
    title = f"{run}; {describe_device(device)}"
    print_rows(rows, title)
    table, plot = options.out / "ops.csv", options.out / "ops.png"
    write_csv(table, rows)
    plot_ops(plot, rows, image_sizes[0], title)
    print(table, plot)


if __name__ == "__main__":
    with user_errors(CONF, "train"):
        main()
