"""Every attention op in one backbone, with the same recipe and the same seeds: accuracy, size, speed and memory.

    python scripts/compare_ops.py --small                          # all ops on the digits, in a quarter of an hour
    python scripts/compare_ops.py --ops window agent --seeds 0 1 2 data=cifar10 recipe.epochs=50
    python scripts/compare_ops.py --resolutions 224 512 model.size=tiny data=imagenet data.root=/data/in1k

What has a `=` is for train.py. The runs are those of `train.py model=swin model.mixers=<op> seed=<seed> ...`, in the
same folders: a finished one is not run again, one that was stopped goes on, and those of a sweep (`train.py -m ...`)
are taken as they are. An op that fails has its reason in the table, and the others go on. Afterwards speed and memory
are measured, all ops in turn in one process.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from timm.layers import to_2tuple

from models import model_name
from ops import list_ops
from retinue.benchmarks.models import Setting, benchmark
from retinue.benchmarks.timing import Row, describe_device, pick_device, print_rows, write_csv
from retinue.evaluation.statistics import mean_ci95
from retinue.runs.config import register_resolvers
from retinue.runs.result_file import read_result
from retinue.runs.training import train
from retinue.utils.errors import user_errors
from retinue.utils.files import replacing
from retinue.utils.paths import CONF
from retinue.utils.suggestions import nearest

SMALL = ("data.image_size=16", "recipe.epochs=3")


def compare(
    backbone: str, ops: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], outputs: Path
) -> tuple[list[Row], dict[str, dict[str, Any]], DictConfig]:
    """Train what is not trained yet.

    Returns:
        A row for each op; the net of each that could be trained, as arguments of `models.create_model`; a run's config.
    """
    place = f"run_dir={outputs}/${{run_folder:}}"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        configs = {
            op: [compose("train", [f"model={backbone}", f"model.mixers={op}", *overrides, f"seed={seed}", place])
                 for seed in seeds]
            for op in ops
        }  # fmt: skip
    rows, nets = [], {}
    for op in ops:
        results: list[dict[str, Any]] = []
        row: Row = {"what": op}
        try:
            for cfg in configs[op]:
                train(cfg)
                results.append(read_result(Path(cfg.run_dir)) or {})
        except Exception as error:  # whatever is wrong with one op is not the others' affair
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        else:
            row |= {"params_m": results[0]["params"] / 1e6, "macs_g": results[0]["macs"] / 1e9}
            cfg = configs[op][0]
            nets[op] = {"name": model_name(cfg.model, cfg.data.image_size), "mixers": op}
        rows.append({**row, **accuracy(results)})
    return rows, nets, configs[ops[0]][0]


def accuracy(results: Sequence[Mapping[str, Any]]) -> Row:
    """The mean of test top-1 over seeds, with its 95 % confidence interval by Student's t."""
    if not results:
        return {"top1": None, "ci95": None, "seeds": 0}
    mean, half = mean_ci95([result["metrics"]["test/top1"] for result in results])
    return {"top1": mean, "ci95": None if math.isnan(half) else half, "seeds": len(results)}


def measure(nets: Mapping[str, Mapping[str, Any]], setting: Setting, rounds: int) -> dict[str, Row]:
    """Speed and memory of each net at one resolution: columns for the op's row."""
    size, columns = setting.image_size, {op: {} for op in nets}
    for row in benchmark(nets, setting, rounds=rounds):
        kind = "train" if row["mode"] == "training" else "infer"
        columns[str(row["what"])] |= {f"{kind}_images_per_s@{size}": row["images_per_s"]}
        columns[str(row["what"])] |= {f"{kind}_peak_mb@{size}": row["peak_mb"]}
    return columns


def plot(path: str | Path, rows: Sequence[Mapping[str, Any]], size: int, subtitle: str) -> None:
    """Top-1 of each op with its interval, best on top, and against the training speed at `size` pixels."""
    from matplotlib.figure import Figure

    rows = sorted((row for row in rows if row["top1"] is not None), key=lambda row: row["top1"])
    speed = f"train_images_per_s@{size}"
    figure = Figure((11, max(3.5, 0.3 * len(rows) + 1.5)), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.errorbar(
        [row["top1"] for row in rows],
        [row["what"] for row in rows],
        xerr=[row["ci95"] or 0 for row in rows],
        fmt="o",
        color="#0072b2",
        capsize=3,
    )
    left.set(xlabel="test top-1 (bar: 95 % confidence interval over seeds)")
    measured = [row for row in rows if speed in row]
    right.scatter([row[speed] for row in measured], [row["top1"] for row in measured], color="#0072b2")
    for row in measured:
        at = (row[speed], row["top1"])
        right.annotate(row["what"], at, textcoords="offset points", xytext=(4, 4), fontsize="x-small")
    right.set(xlabel=f"training images/s at {size} pixels", ylabel="test top-1")
    if measured:
        right.set_xscale("log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(subtitle, fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Compare attention ops in one backbone.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", default=list_ops(), metavar="OP", help="all, if not given")
    parser.add_argument("--backbone", default="swin", help="of conf/model, one that takes mixers")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--small", action="store_true", help=f"short runs: {' '.join(SMALL)}")
    parser.add_argument("--resolutions", nargs="+", type=int, metavar="PIXELS", help="to measure at; the data's own")
    parser.add_argument("--batch-size", type=int, default=32, help="of the measurement")
    parser.add_argument("--rounds", type=int, default=5, help="of the measurement")
    parser.add_argument("--device", default="auto", help="of the measurement: auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where train.py's folders are")
    parser.add_argument("--into", type=Path, default=Path("compare_ops"), help="folder of the table and the plot")
    argv = sys.argv[1:] if argv is None else argv
    overrides = [argument for argument in argv if "=" in argument and not argument.startswith("-")]
    args = parser.parse_args([argument for argument in argv if argument not in overrides])
    for op in args.ops:
        if op not in list_ops():
            raise ValueError(f"no op is called {op!r}.{nearest(op, list_ops())} There are: {', '.join(list_ops())}")
    device = pick_device(args.device)
    if args.small:
        overrides = [*SMALL, *overrides]

    register_resolvers()
    rows, nets, cfg = compare(args.backbone, args.ops, args.seeds, overrides, args.outputs)
    sizes = args.resolutions or [int(max(to_2tuple(cfg.data.image_size)))]
    for size in sizes:
        setting = Setting(size, args.batch_size, str(device), args.dtype, channels_last=False, compile=False)
        measured = measure(nets, setting, args.rounds)
        rows = [{**row, **measured.get(str(row["what"]), {})} for row in rows]
    rows.sort(key=lambda row: -1 if row["top1"] is None else row["top1"], reverse=True)
    net = model_name(cfg.model, cfg.data.image_size)
    title = f"{net} on {cfg.data.name}, {cfg.recipe.epochs} epochs, {len(args.seeds)} seeds; {describe_device(device)}"
    print_rows(rows, title)
    args.into.mkdir(parents=True, exist_ok=True)
    write_csv(args.into / "ops.csv", rows)
    plot(args.into / "ops.png", rows, sizes[0], title)
    print(args.into / "ops.csv", args.into / "ops.png")


if __name__ == "__main__":
    with user_errors(CONF, "train"):
        main()
