"""Compare attention ops or gates in one backbone, with the same recipe and seeds: accuracy, size, speed and memory.

    python scripts/compare_ops.py small=true                       # all ops on the digits, one seed of three epochs
    python scripts/compare_ops.py ops=[window,agent] seeds=[0,1,2] data=cifar10 recipe.epochs=50
    python scripts/compare_ops.py ops=[window,agent] match=macs tune=8 data=cifar10 recipe.epochs=50
    python scripts/compare_ops.py kind=gate gates=[eca,ela] backbone=timm model.name=resnet50 small=true
    python scripts/compare_ops.py ops=[window,bilevel_routing] small=true sight=[erf,attention]
    python scripts/compare_ops.py launcher=slurm image_sizes=[224,512] data=imagenet data.root=/data/in1k

All other keys are for train.py. The runs are those of `train.py model=swin model.mixers=<op> seed=<seed> ...`, or with
`model.gates=<gate>`, in the same folders: a finished run is not repeated, a stopped run is resumed, and the runs of a
sweep (`train.py -m ...`) are used as they are. An op that fails has its reason below the table, and the other ops go
on. Afterwards speed and memory are measured, all ops in turn in one process.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from timm.layers import to_2tuple

from models import model_name
from ops.gate_registry import NONE
from retinue.benchmarks.timing import describe_device, pick_device, print_rows, write_csv
from retinue.results.compare_ops import (
    SMALL,
    Comparison,
    check_ops,
    choices_of,
    compare,
    make_comparison_page,
    measure,
    plot_ops,
    summarise_row,
)
from retinue.results.sight.sheet import draw_sheets
from retinue.results.sight.subject import read_query
from retinue.runs.config import register_resolvers
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from retinue.utils.files import write_text
from retinue.utils.paths import CONF


class Options(command_line.Options):
    kind: Literal["op", "gate"] = Field("op", description="what is compared")
    ops: list[str] | None = Field(None, min_length=1, description="ops to compare; null: all")
    gates: list[str] | None = Field(
        None, min_length=1, description="gates to compare with kind=gate; none: no gate; null: all"
    )
    backbone: str = Field("swin", description="backbone in conf/model; kind=op: one that takes mixers")
    seeds: list[int] | None = Field(
        None, min_length=1, description="seeds of the runs; null: 0, 1 and 2, or 0 alone with small"
    )
    small: bool = Field(False, description=f"short runs of one seed: {' '.join(SMALL)}")
    baseline: str | None = Field(
        None,
        description="op or gate with which the others are compared; null: none for gates; window or the first of ops",
    )
    match: Literal["macs", "params"] | None = Field(None, description="what all nets have as much of as the baseline's")
    adjust: Literal["width", "depth"] = Field("width", description="what match changes")
    tune: int = Field(0, ge=0, description="trials to tune each op, the same for all ops, judged by validation")
    space: str = Field("lr_wd", description="search space of the trials, in conf/search, or FILE.yaml")
    test_sizes: list[int] = Field([], description="further image sizes at which each run is tested, px")
    image_sizes: list[int] | None = Field(
        None, min_length=1, description="image sizes of the measurement, px; null: the data's own"
    )
    batch_size: int = Field(32, ge=1, description="images in a batch of the measurement")
    rounds: int = Field(5, ge=1, description="how often each net is timed")
    device: str = Field("auto", description="device of the measurement: auto, cpu, cuda or cuda:N")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="type of the measurement")
    sight: list[Literal["erf", "attention", "routes", "gradcam", "pca"]] = Field(
        [], description="kinds of scripts/see.py of which a sheet is drawn, with a row for the first run of each op"
    )
    query: list[str] = Field(["0.5", "0.5"], description="attention, routes: [y,x] as shares of the height and width")
    launcher: str | None = Field(None, description="launcher of the runs, such as slurm; null: this process")
    folder: Path = Field(Path("outputs"), description="folder of the runs")
    out: Path = Field(Path("compare_ops"), description="folder of the table, the plot and the page")


def read_names(options: Options) -> list[str]:
    """Return the names of the ops or gates that are compared.

    Raises:
        ValueError: Ops are named for `kind=gate`, or gates for `kind=op`.
    """
    named = {"op": options.ops, "gate": options.gates}
    for kind, names in named.items():
        if kind != options.kind and names is not None:
            raise ValueError(f"{kind}s are compared with kind={kind}, not kind={options.kind}")
    return named[options.kind] or choices_of(options.kind)


def main(arguments: Sequence[str] | None = None) -> None:
    options, overrides = Options.parse_some(arguments)
    ops = read_names(options)
    default = NONE if options.kind == "gate" else "window" if "window" in ops else ops[0]
    baseline = options.baseline or default
    check_ops([*ops, baseline], options.kind)
    device, query = pick_device(options.device), read_query(options.query)
    seeds = ([0] if options.small else [0, 1, 2]) if options.seeds is None else options.seeds
    if options.small:
        overrides = [*SMALL, *overrides]

    register_resolvers()
    shared = ("kind", "backbone", "folder", "launcher", "match", "adjust", "tune", "space", "test_sizes")
    comparison = Comparison(
        ops=list(dict.fromkeys([*ops, baseline])),
        baseline=baseline,
        seeds=seeds,
        overrides=overrides,
        **{name: getattr(options, name) for name in shared},
    )
    cfg = comparison.config
    entries = compare(comparison)
    image_sizes = options.image_sizes or [int(max(to_2tuple(cfg.data.image_size)))]
    for size in image_sizes:
        measure(comparison, entries, size, options.batch_size, str(device), options.dtype, options.rounds)
    figure = comparison.figure
    rows = sorted((entry.columns for entry in entries.values()), key=lambda row: row.get(figure) or -1, reverse=True)
    net = model_name(cfg.model, cfg.data.image_size)
    run = f"{net} on {cfg.data.name}, {cfg.recipe.epochs} epochs, seeds {', '.join(map(str, seeds))}"
    title = f"{run}; {describe_device(device)}"
    print_rows([summarise_row(row) for row in rows], title)
    for row in rows:
        if row.get("failed"):
            print(f"{row['what']} failed: {row['failed']}")
    table, plot, page = (options.out / f"{options.kind}s.{ending}" for ending in ("csv", "png", "html"))
    write_csv(table, rows)
    plot_ops(plot, rows, figure, image_sizes[0], title)
    write_text(page, make_comparison_page(comparison, entries, run))
    # One sheet for each kind of sight, with the ops in the order of the table
    sheets = {kind: options.out / f"{options.kind}s_{kind}.png" for kind in options.sight}
    if sheets:
        ordered = {op: entries[op].runs for op in (str(row["what"]) for row in rows)}
        shown = {op: next(iter(folders.values())) for op, folders in ordered.items() if folders}
        draw_sheets(shown, query, device, sheets, run)
    print(table, plot, page, *sheets.values())


if __name__ == "__main__":
    with user_errors(CONF, "train"):
        main()
