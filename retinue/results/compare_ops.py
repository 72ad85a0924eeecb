"""Ops or gates compared in one backbone: equal budgets and tuning, runs over seeds, paired statistics, and speed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from omegaconf import DictConfig, OmegaConf
from timm.layers import to_2tuple

from ops import list_gates, list_ops
from ops.gate_registry import NONE
from ops.registry import family_of
from retinue.benchmarks.models import Setting, benchmark
from retinue.benchmarks.op_properties import cost_exponent
from retinue.benchmarks.timing import Row
from retinue.evaluation.statistics import holm, rate_interval
from retinue.results import budgets
from retinue.results.baseline import compare_runs
from retinue.results.collection import read_run
from retinue.results.report import make_data, make_page, read_curves
from retinue.results.search import read_space, to_overrides
from retinue.runs.many import compose_runs, evaluate_run, one_line, train_all
from retinue.runs.preprocessing import resolve_preprocessing
from retinue.runs.result_file import read_result
from retinue.utils.files import replacing
from retinue.utils.sizes import resolve, size_pixels
from retinue.utils.suggestions import nearest

# Overrides for short runs.
SMALL = ("data.image_size=16", "recipe.epochs=3")
# Seed of the trials of the tuning, which no compared run may have, and of the points of the space.
TUNING_SEED = 1000
# Mode of a benchmark -> prefix of the table's columns.
PREFIXES = {"inference": "infer", "training": "train"}


# Kind of what is compared -> the key of the section `model` that takes its names.
KEYS = {"op": "mixers", "gate": "gates"}


def choices_of(kind: str) -> list[str]:
    """Return the names that can be compared: the ops, or `none` and the gates."""
    return list_ops() if kind == "op" else [NONE, *list_gates()]


def check_ops(names: Sequence[str], kind: str = "op") -> None:
    """Raise a ValueError with the nearest name if one of the names is no op, or no gate for the kind "gate"."""
    choices = choices_of(kind)
    for name in names:
        if name not in choices:
            raise ValueError(f"no {kind} is called {name!r}.{nearest(name, choices)} There are: {', '.join(choices)}")


@dataclass(frozen=True)
class Comparison:
    """A comparison of ops or gates in one backbone.

    Attributes:
        kind: "op" or "gate".
        backbone: Name in conf/model of a backbone; for ops, of one that takes mixers.
        ops: Names of ops or gates.
        baseline: The op whose net is the budget, and with which the others are compared.
        seeds: Seeds of the runs.
        overrides: Further overrides of train.py.
        folder: Folder of the runs, as of train.py.
        launcher: Name in conf/hydra/launcher; None trains in this process.
        match: `macs` or `params` that all nets are to have, or None for nets as they are.
        adjust: `width` or `depth`, which is changed for `match`.
        tune: Number of trials in which each op is tuned; 0 for the recipe as it is.
        space: Search space of the trials, as of `retinue.results.search.read_space`.
        test_sizes: Further image sizes, in pixels, at which each run is tested.
    """

    kind: str
    backbone: str
    ops: Sequence[str]
    baseline: str
    seeds: Sequence[int]
    overrides: Sequence[str]
    folder: Path
    launcher: str | None = None
    match: str | None = None
    adjust: str = "width"
    tune: int = 0
    space: str = "lr_wd"
    test_sizes: Sequence[int] = ()

    def choices(self, op: str) -> list[str]:
        """Return the overrides of train.py that choose an op or a gate in the backbone."""
        chosen = [] if op == NONE else [f"model.{KEYS[self.kind]}={op}"]
        return [f"model={self.backbone}", *chosen, *self.overrides]

    @cached_property
    def config(self) -> DictConfig:
        """The config of the baseline's runs, with its preprocessing filled in."""
        [cfg] = compose_runs({None: self.choices(self.baseline)}, self.folder).values()
        resolve_preprocessing(cfg)
        return cfg

    @property
    def figure(self) -> str:
        """Name of the task's main figure, such as `top1`."""
        return str(self.config.task.figure)


@dataclass
class Entry:
    """One op of a comparison.

    Attributes:
        choices: Overrides of train.py for the op's runs, without the seed.
        columns: Columns of the table so far; `failed` is why the op has no result.
        runs: Folders of the finished runs by seed.
        evaluations: Folders of the tests at other image sizes.
    """

    choices: list[str]
    columns: Row
    runs: dict[int, Path] = field(default_factory=dict)
    evaluations: list[Path] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return "failed" in self.columns


def compare(comparison: Comparison) -> dict[str, Entry]:
    """Match, tune, train and test all ops; what has been done is not repeated, and an op that fails has its reason.

    Raises:
        ValueError: An override or a setting is wrong.
    """
    if comparison.tune and TUNING_SEED in comparison.seeds:
        raise ValueError(f"seed {TUNING_SEED} is that of the trials: choose other seeds for the comparison")
    entries = {op: Entry(comparison.choices(op), describe(op, comparison.kind)) for op in comparison.ops}
    figure = comparison.figure
    if comparison.match:
        match_budgets(comparison, entries)
    if comparison.tune:
        tune(comparison, entries, figure)
    runs = {
        (op, seed): [*entry.choices, f"seed={seed}"]
        for op, entry in entries.items()
        for seed in comparison.seeds
        if not entry.failed
    }
    for (op, seed), ended in train_all(runs, comparison.folder, comparison.launcher).items():
        if isinstance(ended, str):
            entries[op].columns["failed"] = ended
        else:
            entries[op].runs[seed] = ended
    for entry in entries.values():
        if entry.runs:
            add_results(entry, figure)
    for size in comparison.test_sizes:
        test_at(comparison, entries, size, figure)
    add_differences(comparison, entries, figure)
    return entries


def describe(op: str, kind: str) -> Row:
    """Return the columns that do not depend on a run, or the reason why the op cannot be run."""
    if kind == "gate":
        return {"what": op}
    columns: Row = {"what": op, "family": family_of(op)}
    try:
        exponent = cost_exponent(op)
    except Exception as error:
        return columns | {"failed": one_line(error)}
    return columns | {"growth": None if exponent is None else f"N^{exponent:.1f}"}


def match_budgets(comparison: Comparison, entries: Mapping[str, Entry]) -> None:
    """Give each op's net the width or depth at which it comes closest to the baseline's net as it is."""
    cfg = comparison.config
    model: Any = OmegaConf.to_container(cfg.model, resolve=True)
    height, width = to_2tuple(cfg.data.image_size)
    setting = budgets.Setting(str(comparison.match), (int(height), int(width)), cfg.data.in_chans)
    budget = budgets.cost(model, setting)
    for op, entry in entries.items():
        if op == comparison.baseline:
            continue
        try:
            arguments = budgets.match({**model, KEYS[comparison.kind]: op}, setting, budget, comparison.adjust)
        except Exception as error:
            # The op cannot be built, which must not stop the others.
            entry.columns["failed"] = one_line(error)
        else:
            overrides = to_overrides({f"++model.args.{name}": value for name, value in arguments.items()})
            entry.choices += overrides
            entry.columns[comparison.adjust] = short(overrides)


def tune(comparison: Comparison, entries: Mapping[str, Entry], figure: str) -> None:
    """Choose for each op the best of the same trials by validation, and add its values to the op's overrides."""
    points = draw_points(comparison.space, comparison.tune)
    trials = {
        (op, i): [*entry.choices, *point, f"seed={TUNING_SEED}"]
        for op, entry in entries.items()
        for i, point in enumerate(points)
        if not entry.failed
    }
    ended = train_all(trials, comparison.folder, comparison.launcher)
    for op, entry in entries.items():
        if entry.failed:
            continue
        scores = {i: best_validation(run, figure) for i in range(len(points)) if isinstance(run := ended[op, i], Path)}
        if not scores:
            entry.columns["failed"] = str(ended[op, 0])
            continue
        best = points[max(scores, key=lambda i: scores[i])]
        entry.choices += best
        entry.columns["tuned"] = short(best)


def draw_points(space: str, count: int) -> list[list[str]]:
    """Return overrides of train.py at random points of a search space, the same ones at every call.

    Numbers have three digits.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=TUNING_SEED))
    distributions = read_space(space)
    points = [study.ask({**distributions}).params for _ in range(count)]
    return [to_overrides({key: _rounded(value) for key, value in point.items()}) for point in points]


def _rounded(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def short(overrides: Sequence[str]) -> str:
    """Return overrides without the sections of their keys, such as `dim=40`."""
    pairs = [override.partition("=") for override in overrides]
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs)


def best_validation(run: Path, figure: str) -> float:
    """Return the best value of a figure over the epochs of a run."""
    return max((value for _, value in read_curves(run / "metrics.csv").get(f"val/{figure}", [])), default=-math.inf)


def add_results(entry: Entry, figure: str) -> None:
    """Add parameters, MACs, and the mean test figure over seeds with its 95 % interval to an op's columns."""
    results = [read_result(run) or {} for run in entry.runs.values()]
    entry.columns |= {"params_m": results[0]["params"] / 1e6, "macs_g": results[0]["macs"] / 1e9, "seeds": len(results)}
    entry.columns |= summarise_rates(figure, [result["metrics"][f"test/{figure}"] for result in results])


def summarise_rates(name: str, rates: Sequence[float]) -> Row:
    """Return the columns of a figure: mean over seeds, and the ends of its 95 % interval (None for one seed)."""
    low, high = rate_interval(rates) if len(rates) > 1 else (None, None)
    return {name: sum(rates) / len(rates), f"{name}_low": low, f"{name}_high": high}


def test_at(comparison: Comparison, entries: Mapping[str, Entry], size: int, figure: str) -> None:
    """Test the best weights of all runs with images of another size, and add the columns `<figure>@<size>`."""
    settings = [text for text in comparison.overrides if text.startswith(("trainer=", "trainer.accelerator="))]
    for entry in entries.values():
        try:
            tests = [evaluate_run(run, [f"data.image_size={size}", *settings]) for run in entry.runs.values()]
        except Exception as error:
            # A net may not take images of this size.
            entry.columns[f"failed@{size}"] = one_line(error)
            continue
        entry.evaluations += tests
        rates = [(read_result(folder) or {})["metrics"][f"test/{figure}"] for folder in tests]
        if rates:
            entry.columns |= summarise_rates(f"{figure}@{size}", rates)


def add_differences(comparison: Comparison, entries: Mapping[str, Entry], figure: str) -> None:
    """Add each op's difference to the baseline: mean, 95 % interval, `same_within`, and p after Holm.

    `retinue.results.baseline.compare_runs` compares the runs, and `retinue.evaluation.statistics.Difference` describes
    the columns.
    """
    base = entries[comparison.baseline].runs
    found = {op: compare_runs(entry.runs, base, figure) for op, entry in entries.items() if op != comparison.baseline}
    differences = {op: difference for op, difference in found.items() if difference is not None}
    adjusted = holm([difference.p for difference in differences.values()])
    for (op, difference), p in zip(differences.items(), adjusted, strict=True):
        entries[op].columns |= {"diff": difference.mean, "diff_low": difference.low, "diff_high": difference.high}
        entries[op].columns |= {"same_within": difference.same_within, "p": None if math.isnan(p) else p}


def summarise_row(row: Row) -> Row:
    """Return the columns for the terminal: a mean with its interval, only training speed, and no long reasons."""
    shown: Row = {}
    for name, value in row.items():
        low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
        if "@" not in name and low is not None and high is not None:
            shown[name] = f"{value:.3f} ({low:.3f} to {high:.3f})"
        elif name in ("seeds", "failed") or name.endswith(("_low", "_high")):
            continue
        elif not name.startswith(("infer_", "train_peak_")):
            shown[name] = value
    return shown


def make_comparison_page(comparison: Comparison, entries: Mapping[str, Entry], title: str) -> str:
    """Return the HTML page of the compared runs and their tests at other sizes: quality against cost, and curves."""
    folders = [folder for entry in entries.values() for folder in (*entry.runs.values(), *entry.evaluations)]
    data = make_data([read_run(folder) for folder in folders], comparison.folder, pictures=True)
    return make_page(data, title)


def measure(
    comparison: Comparison,
    entries: Mapping[str, Entry],
    image_size: int,
    batch_size: int,
    device: str,
    dtype: str,
    rounds: int,
) -> None:
    """Add the speed (images/s) and peak memory (MB) of each op's net, all measured in turn in one process.

    Args:
        comparison: The comparison.
        entries: Its entries; those that have failed are left out.
        image_size: Side of the images in pixels; it stands in the columns' names.
        batch_size: Images in a batch.
        device: `cpu`, `cuda` or `cuda:N`.
        dtype: `float32`, or the type of autocast.
        rounds: How often each net is timed.
    """
    nets = {}
    choices = {op: entry.choices for op, entry in entries.items() if not entry.failed}
    for op, cfg in compose_runs(choices, comparison.folder).items():
        # The size of the net is that of the runs, whatever the size of the measured images.
        name, arguments = resolve(cfg.model, size_pixels(cfg.data))
        nets[op] = {"name": name, **arguments}
    setting = Setting(image_size, batch_size, device, dtype, channels_last=False)
    for row in benchmark(nets, setting, rounds=rounds):
        prefix = PREFIXES[str(row["mode"])]
        entries[str(row["what"])].columns |= {
            f"{prefix}_images_per_s@{image_size}": row["images_per_s"],
            f"{prefix}_peak_mb@{image_size}": row["peak_mb"],
        }


def plot_ops(path: str | Path, rows: Sequence[Mapping[str, Any]], figure: str, image_size: int, title: str) -> None:
    """Plot the test figure of each op with its interval, the best on top, and the figure against the training speed.

    Args:
        path: The picture to write.
        rows: Columns of the entries.
        figure: Name of the figure, such as `top1`.
        image_size: Image size of the speed, in pixels.
        title: Title of the picture.
    """
    from matplotlib.figure import Figure

    rows = sorted((row for row in rows if row.get(figure) is not None), key=lambda row: row[figure])
    speed = f"train_images_per_s@{image_size}"
    picture = Figure((11, max(3.5, 0.3 * len(rows) + 1.5)), dpi=150, layout="constrained")
    left, right = picture.subplots(1, 2)
    values, names = [row[figure] for row in rows], [row["what"] for row in rows]
    left.errorbar(values, names, xerr=_error_bars(rows, figure), fmt="o", color="#0072b2", capsize=3)
    left.set(xlabel=f"test {figure} (bar: 95 % confidence interval over seeds)")
    measured = [row for row in rows if speed in row]
    speeds = [row[speed] for row in measured]
    right.scatter(speeds, [row[figure] for row in measured], color="#0072b2")
    for row in measured:
        right.annotate(
            row["what"], (row[speed], row[figure]), textcoords="offset points", xytext=(4, 4), fontsize="x-small"
        )
    right.set(xlabel=f"training images/s at {image_size} pixels", ylabel=f"test {figure}")
    # The labels of a logarithmic axis overlap if it spans less than a decade or so.
    if speeds and max(speeds) > 5 * min(speeds):
        right.set_xscale("log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    picture.suptitle(title, fontsize="small")
    with replacing(path) as temporary:
        picture.savefig(temporary)


def _error_bars(rows: Sequence[Mapping[str, Any]], figure: str) -> list[list[float]]:
    """Return the lengths of the bars below and above each mean; 0 where there is no interval."""
    ends = [(row[f"{figure}_low"], row[figure], row[f"{figure}_high"]) for row in rows]
    below = [0.0 if low is None else mean - low for low, mean, _ in ends]
    return [below, [0.0 if high is None else high - mean for _, mean, high in ends]]
