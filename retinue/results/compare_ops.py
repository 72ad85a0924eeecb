"""Ops compared in one backbone: train a run for each op and seed, measure speed and memory, plot."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from models import model_name
from ops import list_ops
from retinue.benchmarks.models import Setting, benchmark
from retinue.benchmarks.timing import Row
from retinue.evaluation.statistics import mean_ci95
from retinue.runs.preprocessing import resolve_preprocessing
from retinue.runs.result_file import read_result
from retinue.runs.training import train
from retinue.utils.files import replacing
from retinue.utils.paths import CONF
from retinue.utils.suggestions import nearest

# Overrides for runs that take a quarter of an hour together.
SMALL = ("data.image_size=16", "recipe.epochs=3")
# Maximum length of an error message in the table, in characters.
MAX_MESSAGE_LENGTH = 200
# Mode of a benchmark -> prefix of the table's columns.
PREFIXES = {"inference": "infer", "training": "train"}


def check_ops(names: Sequence[str]) -> None:
    """Raise a ValueError with the nearest name if one of the names is no op."""
    for name in names:
        if name not in list_ops():
            raise ValueError(f"no op is called {name!r}.{nearest(name, list_ops())} There are: {', '.join(list_ops())}")


def train_ops(
    backbone: str, ops: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], folder: Path
) -> tuple[list[Row], dict[str, dict[str, Any]], DictConfig]:
    """Train each op in the backbone with each seed, except for the runs that are finished.

    Args:
        backbone: Name in conf/model of a backbone that takes mixers.
        ops: Names of ops.
        seeds: Seeds of the runs.
        overrides: Further overrides of train.py.
        folder: Folder of the runs, as of train.py.

    Returns:
        A row for each op, with its accuracy or the reason for which it failed; the arguments of `models.create_model`
        for each op that could be trained; the config of one run.
    """
    run_dir = f"run_dir={folder}/${{run_folder:}}"
    # Compose all configs first, so that a mistake in the overrides is an error before anything runs.
    configs: dict[str, list[DictConfig]] = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for op in ops:
            choice = [f"model={backbone}", f"model.mixers={op}", *overrides]
            configs[op] = [compose("train", [*choice, f"seed={seed}", run_dir]) for seed in seeds]
    rows: list[Row] = []
    nets: dict[str, dict[str, Any]] = {}
    for op in ops:
        results: list[dict[str, Any]] = []
        row: Row = {"what": op}
        try:
            for cfg in configs[op]:
                train(cfg)
                results.append(read_result(Path(cfg.run_dir)) or {})
        except Exception as error:
            # Whatever is wrong with one op must not stop the others.
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_MESSAGE_LENGTH]
        else:
            row |= {"params_m": results[0]["params"] / 1e6, "macs_g": results[0]["macs"] / 1e9}
            cfg = configs[op][0]
            nets[op] = {"name": model_name(cfg.model, cfg.data.image_size), "mixers": op}
        rows.append({**row, **summarise_accuracy(results)})
    cfg = configs[ops[0]][0]
    resolve_preprocessing(cfg)
    return rows, nets, cfg


def summarise_accuracy(results: Sequence[Mapping[str, Any]]) -> Row:
    """Return the mean of test top-1 over seeds, half the width of its 95 % interval (Student's t), and the seeds."""
    if not results:
        return {"top1": None, "ci95": None, "seeds": 0}
    mean, half_width = mean_ci95([result["metrics"]["test/top1"] for result in results])
    return {"top1": mean, "ci95": None if math.isnan(half_width) else half_width, "seeds": len(results)}


def measure_ops(
    nets: Mapping[str, Mapping[str, Any]], image_size: int, batch_size: int, device: str, dtype: str, rounds: int
) -> dict[str, Row]:
    """Measure the speed (images/s) and peak memory (MB) of each net, all nets in turn in one process.

    Args:
        nets: Arguments of `models.create_model` by op.
        image_size: Side of the images in pixels; it stands in the columns' names.
        batch_size: Images in a batch.
        device: `cpu`, `cuda` or `cuda:N`.
        dtype: `float32`, or the type of autocast.
        rounds: How often each net is timed.

    Returns:
        The new columns of each op's row.
    """
    setting = Setting(image_size, batch_size, device, dtype, channels_last=False)
    columns: dict[str, Row] = {op: {} for op in nets}
    for row in benchmark(nets, setting, rounds=rounds):
        prefix = PREFIXES[str(row["mode"])]
        columns[str(row["what"])] |= {
            f"{prefix}_images_per_s@{image_size}": row["images_per_s"],
            f"{prefix}_peak_mb@{image_size}": row["peak_mb"],
        }
    return columns


def plot_ops(path: str | Path, rows: Sequence[Mapping[str, Any]], image_size: int, title: str) -> None:
    """Plot the top-1 of each op with its interval, the best on top, and the top-1 against the training speed.

    Args:
        path: The picture to write.
        rows: Rows of `train_ops`, with the columns of `measure_ops`.
        image_size: Image size of the speed, in pixels.
        title: Title of the picture.
    """
    from matplotlib.figure import Figure

    rows = sorted((row for row in rows if row["top1"] is not None), key=lambda row: row["top1"])
    speed = f"train_images_per_s@{image_size}"
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
        point = (row[speed], row["top1"])
        right.annotate(row["what"], point, textcoords="offset points", xytext=(4, 4), fontsize="x-small")
    right.set(xlabel=f"training images/s at {image_size} pixels", ylabel="test top-1")
    if measured:
        right.set_xscale("log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary)
