"""A paper's table with our figures beside its own.

    python scripts/reproduce.py paper=biformer
    python scripts/reproduce.py paper=biformer measure=true batch_size=64 out=biformer.md
    python scripts/reproduce.py paper=cswin weights.cswin_tiny=cswin_tiny_224.pth data.root=/data/in1k
    python scripts/reproduce.py paper=cswin table=detection

Parameters and MACs are counted now. Accuracy is that of finished runs of `train.py` below `outputs`, or, where
`weights` and `data` say what to evaluate, of the authors' checkpoints. `measure=true` adds images/s and peak memory of
inference. A figure of ours that is further from the paper's than the tolerance is marked ✗, or * where the reason is
known. What is missing is named below the table, with the command that produces it.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from models import complexity
from retinue.benchmarks.models import Setting, benchmark
from retinue.benchmarks.timing import Row, describe_device, pick_device, write_csv
from retinue.evaluation.statistics import mean_ci95
from retinue.results.collection import Run, find_runs
from retinue.results.papers import (
    DENSE,
    accuracy_agrees,
    agrees,
    dense_experiments,
    experiments,
    model_choice,
    read_paper,
)
from retinue.runs.config import check, register_resolvers, with_run
from retinue.runs.evaluation import evaluate_here
from retinue.utils.errors import user_errors
from retinue.utils.files import replacing
from retinue.utils.paths import CONF
from retinue.utils.suggestions import nearest

FIGURES = {  # of each table: key -> heading and, where a run measures it, the run's metric
    "variants": {"params_m": ("params (M)", ""), "macs_g": ("MACs (G)", ""), "top1": ("top-1 (%)", "test/top1")},
    "detection": {"box_ap": ("box AP", "test/box_ap"), "mask_ap": ("mask AP", "test/mask_ap")},
    "segmentation": {"miou_ss": ("mIoU (%)", "test/miou")},
}
TASKS = {"variants": "classification", "detection": "detection", "segmentation": "segmentation"}
DATA = {"variants": "imagenet", **DENSE}
IMAGES = 50_000  # of ImageNet's validation set


@dataclass
class Options:
    """What the command line takes, as key=value."""

    paper: str | None = None  # of papers
    table: str = "variants"  # or detection, segmentation
    weights: dict[str, str] = field(default_factory=dict)  # weights.<net>=FILE: the authors' checkpoint
    data: dict[str, Any] = field(default_factory=dict)  # data.root=DIR and other keys of conf/data/imagenet.yaml
    measure: bool = False
    batch_size: int = 32  # of the evaluation and the measurement
    device: str = "auto"  # of the measurement: auto, cpu, cuda or cuda:N
    dtype: str = "float32"  # of the measurement
    outputs: str | None = None  # where finished runs are looked for: outputs, if it is there
    out: str | None = None  # a .csv or .md file


@dataclass
class Figure:
    """A figure of the paper's and ours."""

    paper: float | None
    ours: float | None = None
    off: bool = False
    note: str = ""

    def __str__(self) -> str:
        mark = ("*" if self.note else " ✗") if self.off else ""
        small = self.ours is not None and self.ours < 1
        return f"{_format(self.paper, 'g')} / {_format(self.ours, '.3f' if small else '.2f')}{mark}"


@dataclass
class Line:
    """A row of the table: the paper's facts, and what is known of ours."""

    row: Mapping[str, Any]
    label: str  # of its net, as `weights.<label>=` takes it; empty where there is no net
    figures: dict[str, Figure]
    counted: tuple[int, int] | None = None  # parameters and MACs

    @property
    def name(self) -> str:
        words = [self.row.get(key) for key in ("name", "detector", "head", "backbone", "neck", "schedule", "dataset")]
        return ", ".join(str(word) for word in words if word)

    @property
    def name_at(self) -> str:
        """The name with the size of the images, which often tells two rows apart."""
        return f"{self.name} at {self.row['input']} px" if self.row.get("input") else self.name


def parse(arguments: Sequence[str]) -> Options:
    """The options; a ValueError for an unknown one or a value of another kind."""
    given = OmegaConf.from_cli(list(arguments))
    known = Options.__dataclass_fields__
    for key in given:
        if key not in known:
            raise ValueError(f"there is no option {key!r}.{nearest(str(key), known)} There are: {', '.join(known)}")
    if "weights" in given and not isinstance(given.weights, DictConfig):
        raise ValueError(f"weights.<net>=FILE says whose weights they are, not weights={given.weights}")
    options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), given))
    assert isinstance(options, Options)
    if options.paper is None:
        raise ValueError("paper=<name> is missing, such as paper=biformer; docs/papers.md lists them")
    if options.table not in FIGURES:
        raise ValueError(
            f"table={options.table} is unknown.{nearest(options.table, FIGURES)} There are: {', '.join(FIGURES)}"
        )
    if options.out and Path(options.out).suffix not in (".csv", ".md"):
        raise ValueError(f"out={options.out} must be a .csv or a .md file")
    return options


def lines(paper: Mapping[str, Any], table: str) -> list[Line]:
    """The rows of a paper's table, each with the label of its net."""
    rows, nets = paper[table], [row.get("net") for row in paper["variants"]]
    labels = [""] * len(rows)
    if table == "variants":
        sized = [f"{row.get('net')}_{row['input']}" for row in rows]
        for i, net in enumerate(nets):
            if net:
                nth = f"_{sized[: i + 1].count(sized[i])}" if Counter(sized)[sized[i]] > 1 else ""
                labels[i] = net if Counter(nets)[net] == 1 else sized[i] + nth
    else:
        known = {_plain(row["name"]): row["net"] for row in reversed(paper["variants"]) if "net" in row}
        labels = [known.get(_plain(str(row.get("backbone"))), "") for row in rows]
    columns = FIGURES[table]
    return [
        Line(row, label, {key: Figure(row.get(key)) for key in columns})
        for row, label in zip(rows, labels, strict=True)
    ]


def count(line: Line) -> None:
    """Parameters and MACs of the row's net, on the meta device."""
    row = line.row
    net = partial(timm.create_model, row["net"], num_classes=1000, **row.get("args", {}))
    line.counted = complexity(net, row["input"] or 224)
    for key, ours in zip(("params_m", "macs_g"), (line.counted[0] / 1e6, line.counted[1] / 1e9), strict=True):
        figure = line.figures[key]
        if key == "macs_g" and row["input"] is None:  # of images of a size that the paper does not tell
            continue
        figure.ours = ours
        if figure.paper is not None and not agrees(ours, figure.paper):
            figure.off, figure.note = True, row.get(f"{key.partition('_')[0]}_exception", "")


def finished_runs(outputs: str | None) -> list[Run]:
    """Those of train.py below a folder; a ValueError where it was asked for and holds none."""
    try:
        return [run for run in find_runs(outputs or "outputs") if run.result and run.kind == "training"]
    except ValueError:
        if outputs:
            raise
        return []


def find_accuracy(line: Line, table: str, runs: Sequence[Run]) -> None:
    """Figures of the finished runs of the row's net and schedule: the mean over the seeds of one configuration.

    Of several configurations that with the most epochs, then the most seeds.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        assert run.result is not None
        if _is_of(line, table, run.result, run.settings):
            groups.setdefault(json.dumps(run.settings, sort_keys=True), []).append(run.result)
    if not groups:
        return
    results = max(groups.values(), key=lambda group: (group[0]["epochs"], len(group)))
    for key, (_, metric) in FIGURES[table].items():
        values = [100 * result["metrics"][metric] for result in results if metric in result["metrics"]]
        if values:
            mean, half = mean_ci95(values)
            low, high = results[0]["metrics"].get(f"{metric}_ci95") or (mean / 100, mean / 100)
            _set(line.figures[key], mean, (mean - half, mean + half) if len(values) > 1 else (100 * low, 100 * high))


def _is_of(line: Line, table: str, result: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a run's result is of this row: the same net, unchanged, on the whole of the table's data."""
    net, data = line.row.get("net", line.label), _plain(line.row.get("dataset", DATA[table]))
    if (result["task"], result["model"]) != (TASKS[table], net) or not data.startswith(_plain(result["data"])):
        return False
    if line.counted and (result["params"], result["macs"]) != line.counted:
        return False
    if settings.get("model.mixers") or settings.get("data.classes"):
        return False
    if table == "variants":
        return True
    schedule = re.fullmatch(r"(\d+)([xk])", str(line.row["schedule"]).lower())
    length = {"x": ("recipe.epochs", 12), "k": ("recipe.steps", 1000)}  # a schedule of 1x is 12 epochs
    if schedule and settings.get(length[schedule[2]][0]) != int(schedule[1]) * length[schedule[2]][1]:
        return False
    return settings["head.name"] == head_of(line.row)


def head_of(row: Mapping[str, Any]) -> str | None:
    """The choice in conf/head that a row of a detector or segmentor is about."""
    if "train" in row:
        return row["train"][0].partition("=")[2]
    heads = {_plain(path.stem): path.stem for path in (CONF / "head").glob("*.yaml")}
    return heads.get(_plain(row.get("detector") or row["head"]))


def evaluate(line: Line, weights: str, data: Mapping[str, Any], batch_size: int) -> None:
    """Top-1 of a checkpoint on ImageNet, through the evaluation of `eval.py`."""
    choice = model_choice(line.row["net"], line.row.get("args", {}), line.row["input"])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("eval", ["data=imagenet", *choice, f"batch_size={batch_size}", "run_dir=${evaluation_folder:}"])
    cfg.weights = weights
    for key, value in data.items():
        OmegaConf.update(cfg.data, key, value)
    cfg = with_run(cfg, [], [])
    check(cfg)
    metrics = evaluate_here(cfg)["metrics"]
    low, high = metrics["test/top1_ci95"]
    of_a_part = (100 * low, 100 * high) if metrics["test/n"] < IMAGES else None
    _set(line.figures["top1"], 100 * metrics["test/top1"], of_a_part)


def _set(figure: Figure, ours: float, interval: tuple[float, float] | None) -> None:
    figure.ours = ours
    figure.off = figure.paper is not None and not accuracy_agrees(ours, figure.paper, interval)


def measure(table: Sequence[Line], options: Options) -> None:
    """Images/s and peak memory of inference, all nets of one image size in turn."""
    device = str(pick_device(options.device))
    for size in sorted({line.row["input"] for line in table} - {None}):
        at = {line.label: line for line in table if line.row["input"] == size}
        nets = {label: {"name": line.row["net"], **line.row.get("args", {})} for label, line in at.items()}
        setting = Setting(size, options.batch_size, device, options.dtype, channels_last=False, compile=False)
        for row in benchmark(nets, setting, train=False, rounds=3):
            figures = at[str(row["what"])].figures
            figures["images_per_s"] = Figure(
                at[str(row["what"])].row.get("throughput"), float(row["images_per_s"] or 0)
            )
            figures["peak_mb"] = Figure(None, float(row["peak_mb"] or 0))


def missing(paper: str, table: str, rows: Sequence[Line]) -> Iterator[str]:
    """What the table lacks, and what would produce it."""
    if not rows:
        yield f"the files that were read of this paper have no table of {table}"
    absent = list(
        dict.fromkeys(line.row.get("name") or str(line.row.get("backbone")) for line in rows if not line.label)
    )
    if absent:
        yield f"missing, no net here: {', '.join(absent)}"
    wanted = [line for line in rows if line.label and any(figure.ours is None for figure in line.figures.values())]
    if table == "variants":
        trained = {id(row): name for name, row in experiments(paper).items()}
        for line in wanted:
            if line.figures["top1"].ours is None:
                from_weights = f"python scripts/reproduce.py paper={paper} weights.{line.label}=FILE data.root=DIR"
                experiment = trained.get(id(line.row))
                yield f"missing, top-1 of {line.name_at}: " + (
                    f"python train.py experiment={experiment} data.root=DIR" if experiment else from_weights
                )
        if any(line.figures["top1"].ours is None for line in wanted):
            yield f"or from the authors' checkpoints (papers/{paper}.yaml): weights.<net>=FILE data.root=DIR"
    else:
        trained = {id(row["train"]): name for name, (_, row) in dense_experiments(paper).items()}
        for line in wanted:
            head, choice = head_of(line.row), " ".join(model_choice(line.label, {}, None))
            how = f"head={head} {choice} data={DATA[table]}"
            if "train" in line.row:
                how = f"experiment={trained[id(line.row['train'])]}"
            yield f"missing, {line.name}: " + (
                f"python train.py {how} weights=CLASSIFIER.pth data.root=DIR" if head else "its head is not here"
            )


def notes(rows: Sequence[Line]) -> list[str]:
    """The known reasons of the figures that are marked with *."""
    return [f"* {line.name_at}: {figure.note}" for line in rows for figure in line.figures.values() if figure.note]


def cells(rows: Sequence[Line], table: str) -> tuple[list[str], list[list[str]]]:
    """The headings, and the cells of each row: the paper's figure / ours."""
    extra = {"images_per_s": "images/s", "peak_mb": "peak (MB)"}
    shown = {key: heading for key, (heading, _) in FIGURES[table].items()}
    shown |= {key: heading for key, heading in extra.items() if any(key in line.figures for line in rows)}
    body = [[line.name, *[str(line.figures.get(key, Figure(None))) for key in shown]] for line in rows]
    head = [table, *shown.values()]
    if table == "variants":
        head.insert(1, "px")
        for line, row in zip(rows, body, strict=True):
            row.insert(1, _format(line.row["input"], "g"))
    return head, body


def csv_row(line: Line) -> Row:
    row: Row = {"what": line.name, "net": line.row.get("net", line.label) or None, "input": line.row.get("input")}
    for key, figure in line.figures.items():
        row |= {key: figure.paper, f"{key}_ours": figure.ours}
        row[f"{key}_note"] = figure.note or ("outside the tolerance" if figure.off else None)
    return row


def write(path: str, rows: Sequence[Line], title: str, table: str, below: Sequence[str]) -> None:
    if path.endswith(".csv"):
        return write_csv(path, [csv_row(line) for line in rows])
    head, body = cells(rows, table)
    grid = [head, ["---"] * len(head), *body]
    text = "\n".join(f"| {' | '.join(row)} |" for row in grid)
    with replacing(path) as temporary:
        temporary.write_text(f"# {title}\n\n{text}\n\n" + "".join(f"- {line}\n" for line in below))
    return None


def _plain(name: str) -> str:
    """A name as its letters and digits, since papers differ in the rest."""
    return re.sub(r"[\W_]", "", name).lower()


def _format(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    options = parse(arguments)
    assert options.paper is not None
    paper = read_paper(options.paper)
    rows = lines(paper, options.table)
    ours = [line for line in rows if line.label]
    labels = {line.label: line for line in ours}
    for label, file in options.weights.items():
        if label not in labels or options.table != "variants":
            raise ValueError(f"weights.{label}: no row of it.{nearest(label, labels)} There are: {', '.join(labels)}")
        if not Path(file).is_file():
            raise ValueError(f"weights.{label}={file} is not a file")
    register_resolvers()
    if options.table == "variants":
        for line in ours:
            count(line)
    runs = finished_runs(options.outputs)
    for line in ours:
        find_accuracy(line, options.table, runs)
    for label, file in options.weights.items():
        evaluate(labels[label], file, options.data, options.batch_size)
    if options.measure and options.table == "variants":
        measure(ours, options)

    title = f"{paper['title']}: {options.table}, the paper's / ours"
    measured = (
        f"measured on {describe_device(pick_device(options.device))}, batch {options.batch_size}, {options.dtype}"
    )
    below = [*notes(rows), *[measured] * options.measure, *missing(options.paper, options.table, rows)]
    head, body = cells(rows, options.table)
    shown = Table(*head)
    for row in body:
        shown.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(title, soft_wrap=True, highlight=False, markup=False)
    console.print(shown)
    for line in below:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if options.out:
        write(options.out, rows, title, options.table, below)


if __name__ == "__main__":
    with user_errors():
        main()
