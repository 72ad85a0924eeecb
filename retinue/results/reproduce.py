"""Our figures for the rows of a paper's table: counted, from finished runs, from checkpoints, and measured."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from models import complexity
from retinue.benchmarks.models import Setting, benchmark
from retinue.benchmarks.timing import pick_device
from retinue.evaluation.statistics import mean_ci95
from retinue.results.collection import Run, find_runs
from retinue.results.paper_table import DATA, FIGURES, Figure, PaperRow, head_of, normalise, read_rows
from retinue.results.papers import DEFAULT_IMAGE_SIZE, accuracy_agrees, agrees, model_choice, read_paper
from retinue.runs.config import check, register_resolvers, with_run
from retinue.runs.evaluation import evaluate_here
from retinue.utils.paths import CONF
from retinue.utils.suggestions import nearest

TASKS = {"variants": "classification", "detection": "detection", "segmentation": "segmentation"}
OUTPUTS = Path("outputs")
NUM_CLASSES = 1000
# Number of images in ImageNet's validation set.
NUM_IMAGES = 50_000
ROUNDS = 3
# Unit of a schedule such as 3x or 160k -> key of the recipe and its value for one unit; 1x is 12 epochs.
SCHEDULE_UNITS = {"x": ("recipe.epochs", 12), "k": ("recipe.steps", 1000)}


def reproduce(
    paper: str,
    table: str,
    weights: Mapping[str, str],
    data: Mapping[str, Any],
    batch_size: int,
    folder: Path | None,
) -> list[PaperRow]:
    """Return the rows of a paper's table with our figures.

    Args:
        paper: Name of the paper.
        table: `variants`, `detection` or `segmentation`.
        weights: Path of the authors' checkpoint by the label of a row's net; only for `variants`.
        data: Changes of conf/data/imagenet.yaml for the evaluation of `weights`.
        batch_size: Images in a batch of that evaluation.
        folder: Where to look for finished runs. Default (None): `outputs`, if it holds any.

    Raises:
        ValueError: There is no such paper, a label or file in `weights` does not exist, or `folder` holds no run.
    """
    rows = read_rows(read_paper(paper), table)
    rows_with_net = [row for row in rows if row.label]
    # In the table `variants` a label names one row; in the others several rows may have the same net.
    rows_by_label = {row.label: row for row in rows_with_net}
    for label, path in weights.items():
        if label not in rows_by_label or table != "variants":
            hint = nearest(label, rows_by_label)
            raise ValueError(f"weights.{label}: no row has this net.{hint} There are: {', '.join(rows_by_label)}")
        if not Path(path).is_file():
            raise ValueError(f"weights.{label}={path} is not a file")
    register_resolvers()
    if table == "variants":
        for row in rows_with_net:
            count_complexity(row)
    runs = finished_trainings(folder)
    for row in rows_with_net:
        find_accuracy(row, table, runs)
    for label, path in weights.items():
        evaluate_weights(rows_by_label[label], path, data, batch_size)
    return rows


def count_complexity(row: PaperRow) -> None:
    """Count the parameters and MACs of the row's net, on the meta device, and set its figures."""
    facts = row.facts
    net = partial(timm.create_model, facts["net"], num_classes=NUM_CLASSES, **facts.get("args", {}))
    row.complexity = params, macs = complexity(net, facts["input"] or DEFAULT_IMAGE_SIZE)
    _set_count(row.figures["params_m"], params / 1e6, facts.get("params_exception", ""))
    # Without the size of the paper's images its MACs cannot be compared.
    if facts["input"] is not None:
        _set_count(row.figures["macs_g"], macs / 1e9, facts.get("macs_exception", ""))


def _set_count(figure: Figure, ours: float, reason: str) -> None:
    """Set a counted figure; `reason` tells why it differs from the paper's, if that is known."""
    figure.ours = ours
    if figure.paper is not None and not agrees(ours, figure.paper):
        figure.differs = True
        figure.reason = reason


def finished_trainings(folder: Path | None) -> list[Run]:
    """Return the finished runs of `train.py` below a folder.

    Args:
        folder: The folder. Default (None): `outputs`, which may hold no run.

    Raises:
        ValueError: A folder is given that does not exist or holds no run.
    """
    try:
        return [run for run in find_runs(folder or OUTPUTS) if run.result and run.kind == "training"]
    except ValueError:
        if folder is not None:
            raise
        return []


def find_accuracy(row: PaperRow, table: str, runs: Sequence[Run]) -> None:
    """Set the row's figures to the means over the seeds of the finished runs of its net and schedule.

    If the runs have several configurations, the one with the most epochs counts, and among these the one with the most
    seeds.
    """
    results_by_settings: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        assert run.result is not None
        if _is_run_of(row, table, run.result, run.settings):
            results_by_settings.setdefault(json.dumps(run.settings, sort_keys=True), []).append(run.result)
    if not results_by_settings:
        return
    results = max(results_by_settings.values(), key=lambda results: (results[0]["epochs"], len(results)))
    for key, (_, metric) in FIGURES[table].items():
        values = [100 * result["metrics"][metric] for result in results if metric in result["metrics"]]
        if not values:
            continue
        mean, half_width = mean_ci95(values)
        interval = mean - half_width, mean + half_width
        if len(values) == 1:
            # A single run has the interval over its test images.
            low, high = results[0]["metrics"].get(f"{metric}_ci95") or (mean / 100, mean / 100)
            interval = 100 * low, 100 * high
        _set_accuracy(row.figures[key], mean, interval)


def _is_run_of(row: PaperRow, table: str, result: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Tell whether a run trained the row's net, unchanged, on the whole of the table's data, with its schedule."""
    net = row.facts.get("net", row.label)
    data = normalise(row.facts.get("dataset", DATA[table]))
    if (result["task"], result["model"]) != (TASKS[table], net) or not data.startswith(normalise(result["data"])):
        return False
    if row.complexity and (result["params"], result["macs"]) != row.complexity:
        return False
    if settings.get("model.mixers") or settings.get("data.classes"):
        return False
    if table == "variants":
        return True
    schedule = re.fullmatch(r"(\d+)([xk])", str(row.facts["schedule"]).lower())
    if schedule:
        key, length = SCHEDULE_UNITS[schedule[2]]
        if settings.get(key) != int(schedule[1]) * length:
            return False
    return settings["head.name"] == head_of(row.facts)


def evaluate_weights(row: PaperRow, weights: str, data: Mapping[str, Any], batch_size: int) -> None:
    """Set the row's top-1 to that of a checkpoint on ImageNet, by the evaluation of `eval.py`.

    Args:
        row: A row of the table `variants`.
        weights: Path of the checkpoint.
        data: Changes of conf/data/imagenet.yaml.
        batch_size: Images in a batch.
    """
    choice = model_choice(row.facts["net"], row.facts.get("args", {}), row.facts["input"])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("eval", ["data=imagenet", *choice, f"batch_size={batch_size}", "run_dir=${evaluation_folder:}"])
    cfg.weights = weights
    cfg.data.image_size = row.facts["input"]
    for key, value in data.items():
        OmegaConf.update(cfg.data, key, value)
    cfg = with_run(cfg, [], [])
    check(cfg)
    metrics = evaluate_here(cfg)["metrics"]
    low, high = metrics["test/top1_ci95"]
    # A part of the validation set has an interval; for the whole set only the tolerance counts.
    interval = (100 * low, 100 * high) if metrics["test/n"] < NUM_IMAGES else None
    _set_accuracy(row.figures["top1"], 100 * metrics["test/top1"], interval)


def _set_accuracy(figure: Figure, ours: float, interval: tuple[float, float] | None) -> None:
    figure.ours = ours
    figure.differs = figure.paper is not None and not accuracy_agrees(ours, figure.paper, interval)


def measure_inference(rows: Sequence[PaperRow], batch_size: int, device: str, dtype: str) -> None:
    """Measure images/s and peak memory (MB) of inference, all nets of one image size in turn, and add the figures.

    Args:
        rows: Rows of the table `variants`; a row without a net or an image size is skipped.
        batch_size: Images in a batch.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: `float32`, or the type of autocast.
    """
    device = str(pick_device(device))
    rows = [row for row in rows if row.label and row.facts["input"] is not None]
    for size in sorted({row.facts["input"] for row in rows}):
        rows_by_label = {row.label: row for row in rows if row.facts["input"] == size}
        nets = {label: {"name": row.facts["net"], **row.facts.get("args", {})} for label, row in rows_by_label.items()}
        setting = Setting(size, batch_size, device, dtype, channels_last=False)
        for measured in benchmark(nets, setting, train=False, rounds=ROUNDS):
            row = rows_by_label[str(measured["what"])]
            row.figures["images_per_s"] = Figure(row.facts.get("throughput"), float(measured["images_per_s"] or 0))
            row.figures["peak_mb"] = Figure(None, float(measured["peak_mb"] or 0))
