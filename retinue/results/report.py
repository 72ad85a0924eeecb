"""One HTML page of many runs: table, quality against cost, learning curves, and each run's config and commands.

The page is one file that loads nothing else. `page/` holds its template, style and scripts, which show the JSON of
`make_data`.
"""

import csv
import html
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from retinue.results.collection import RUN_KEYS, Group, Run, group_runs
from retinue.results.figures import display_unit, lower_is_better, main_figures
from retinue.results.run_pictures import read_pictures

PAGE_FOLDER = Path(__file__).resolve().parent / "page"
SCRIPTS = ("charts.js", "radar.js", "details.js", "speed.js", "report.js")
# Script of a page that a server keeps up to date.
LIVE_SCRIPT = "live.js"
# Maximum number of points of all curves together, which take about 8 MB.
MAX_POINTS = 400_000
MIN_POINTS_PER_CURVE = 20
# Headings of the figures that the chart of quality against cost offers, and of the table's other columns.
COSTS = {
    "macs": "MACs",
    "params": "Parameters",
    "inference_ms_per_image": "Inference, ms/image",
    "latency_ms": "Latency of one image, ms",
    "latency_p99_ms": "Latency, 99th percentile, ms",
    "inference_joules_per_image": "Energy, J/image",
    "training_ms_per_image": "Training, ms/image",
    "inference_peak_mb": "Memory of inference, MB",
    "peak_memory_mb": "Memory of training, MB",
}
OTHER_COLUMNS = {"images_per_second": "Training, images/s", "epochs": "Epochs", "seconds": "Training, s"}
# Fields of result.json that a run's details show as text.
FACTS = ("device", "precision", "versions", "git_commit", "weights")

Curves = dict[str, list[list[float]]]


def make_data(
    runs: Sequence[Run],
    folder: Path,
    speed: Sequence[Mapping[str, Any]] = (),
    baseline: str | None = None,
    differences: Mapping[int, str] | None = None,
    pictures: bool = False,
) -> dict[str, Any]:
    """Return what the page shows, ready for JSON: every number is finite or absent.

    Args:
        runs: Runs; `training_ms_per_image` is added to their values.
        folder: The folder that the page names as their place.
        speed: What `retinue.results.benchmark_csv.read_speed` returns, for the part on speed.
        baseline: Name of the net with which the others are compared; None compares none.
        differences: Difference to the baseline in words, by the position of the group in `group_runs(runs)`.
        pictures: Embed the pictures that `see.py` has left in the runs' folders.
    """
    for run in runs:
        if rate := run.number("images_per_second"):
            run.values["training_ms_per_image"] = 1000 / rate
    groups = group_runs(runs)
    metrics = [name for run in runs for name in (run.result or {}).get("metrics", {}) if run.number(name) is not None]
    figures = main_figures(runs)
    tests = [name for name in dict.fromkeys([*figures, *metrics]) if name != "test/n"]
    columns = [_describe_column(name, runs) for name in [*tests, *COSTS, *OTHER_COLUMNS]]
    names = [column["name"] for column in columns]
    curves = {run.folder: read_curves(run.folder / "metrics.csv") for run in runs if run.kind == "training"}
    num_curves = sum(map(len, curves.values()))
    max_points = max(MIN_POINTS_PER_CURVE, MAX_POINTS // max(1, num_curves))
    data_sets = Counter(data_set(group) for group in groups for _ in group.runs)
    return {
        "folder": str(folder),
        "made": f"{datetime.now():%d %B %Y, %H:%M}",
        "counts": Counter(run.status for run in runs),
        "columns": columns,
        "curveColumns": [_describe_column(name, runs) for name in _order_curves(curves.values(), figures)],
        "curveFigure": next((name.partition("/")[2] for name in figures), None),
        "baseline": baseline,
        "sets": [name for name, _ in data_sets.most_common()],
        "groups": [
            {
                "name": net_name(group),
                "set": data_set(group),
                "key": group.key,
                "config": _config_text(group.runs[0]),
                "stats": _statistics(group, names),
                "difference": (differences or {}).get(i, ""),
                "runs": [
                    _describe_run(run, names, curves.get(run.folder, {}), max_points)
                    | {"pictures": read_pictures(run.folder) if pictures else []}
                    for run in group.runs
                ],
            }
            for i, group in enumerate(groups)
        ],
        "speed": list(speed),
    }


def _describe_column(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    largest = max((number for run in runs if (number := run.number(name)) is not None), default=0)
    symbol, scale = display_unit(name, largest)
    headings = COSTS | OTHER_COLUMNS
    return {
        "name": name,
        "heading": headings.get(name, name.removeprefix("test/")),
        "unit": symbol,
        "scale": scale,
        "lowerIsBetter": lower_is_better(name),
        "cost": name in COSTS,
        "figure": name.startswith("test/"),
    }


def _order_curves(curves: Iterable[Curves], figures: Sequence[str]) -> list[str]:
    """Return the names of all curves: validation before training, the tasks' main metrics first."""
    main = [name.partition("/")[2] for name in figures]
    names = sorted({name for run_curves in curves for name in run_curves})
    return sorted(names, key=lambda name: (not name.startswith("val/"), name.partition("/")[2] not in main))


def data_set(group: Group) -> str:
    """Return the title of the runs that one chart may compare: the same task on the same data."""
    values = group.runs[0].values
    if "data" not in values:
        return "unknown"
    task = values.get("task", "unknown task")
    if values["kind"] != "evaluation":
        return f"{values['data']} ({task})"
    at_size = f" at {values['image_size']} px" if values.get("image_size") else ""
    return f"{values['data']} ({task}, evaluated{at_size})"


def net_name(group: Group) -> str:
    """Return the name of the net of a group, with the settings that tell the group from others."""
    settings = [
        f"{key.rpartition('.')[2]}={value}"
        for key, value in group.key.items()
        if key not in ("kind", "task", "data", "model") and value not in ("", "null")
    ]
    return ", ".join([group.key["model"] or group.runs[0].folder.name, *settings])


def _config_text(run: Run) -> str:
    """Return the text of `config.yaml` without the seed and the folder; "" if there is none."""
    path = run.config_path
    return RUN_KEYS.sub("", path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else ""


def _statistics(group: Group, names: Sequence[str]) -> dict[str, list[float | None]]:
    """Return [mean, half the width of its 95 % interval] of each name; a group of one run has no interval (None)."""
    statistics = {}
    for name in names:
        summary = group.summary(name)
        if summary is not None and math.isfinite(summary.mean):
            statistics[name] = [summary.mean, _finite_or_none(summary.ci95)]
    return statistics


def _describe_run(run: Run, names: Sequence[str], curves: Curves, max_points: int) -> dict[str, Any]:
    result = run.result or {}
    numbers = {name: number for name in names if (number := run.number(name)) is not None and math.isfinite(number)}
    facts = {name: result[name] for name in FACTS if result.get(name)}
    if isinstance(versions := facts.get("versions"), dict):
        facts["versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    return {
        "folder": str(run.folder),
        "seed": run.values.get("seed"),
        "status": run.status,
        "reason": run.failure,
        "values": numbers,
        "facts": {name.replace("_", " "): str(fact) for name, fact in facts.items()},
        "commands": commands(run),
        "epochs": run.number("recipe.epochs"),
        "curves": {name: thin(points, max_points) for name, points in curves.items()},
    }


def commands(run: Run) -> list[tuple[str, str]]:
    """Return (title, command) pairs: how to resume the run, or how to train it again and to evaluate it.

    An evaluation, a run that is running, and a run without a config have no commands.
    """
    if run.kind == "evaluation" or run.status == "running" or not run.config:
        return []
    if run.status != "finished":
        return [("Resume the run", _train_command(run, str(run.folder)))]
    # The new run is outside the folder of the other runs, since collect.py would average it with them there.
    new_folder = str(Path("again", *run.folder.parts[-4:]))
    return [
        ("Train again in a new folder", _train_command(run, new_folder)),
        ("Evaluate the best weights", f"python eval.py {shlex.quote(f'run={run.folder}')}"),
    ]


def _train_command(run: Run, folder: str) -> str:
    """Return the shell command that trains with the config of the run, in a folder."""
    value = folder if re.fullmatch(r"[\w./-]+", folder) else "'" + folder.replace("'", "\\'") + "'"
    target = f"{shlex.quote(f'hydra.run.dir={value}')} {shlex.quote(f'run_dir={value}')}"
    source = shlex.quote(str(run.folder))
    return f"python train.py --config-dir {source} --config-name config hydra.output_subdir=null {target}"


def read_curves(path: Path) -> Curves:
    """Return the [epoch, value] pairs of each metric in a `metrics.csv`; {} if the file cannot be read.

    Cells that are empty or not finite are skipped, and so is a line that a kill has cut.
    """
    curves: Curves = {}
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                if None in row.values():
                    continue
                epoch = _parse_finite(row.get("epoch"))
                for name, cell in row.items():
                    if name and "/" in name and epoch is not None and (value := _parse_finite(cell)) is not None:
                        curves.setdefault(name, []).append([epoch, value])
    except (OSError, csv.Error):
        return {}
    return curves


def thin(points: list[list[float]], max_points: int) -> list[list[float]]:
    """Return about `max_points` points at most, evenly spaced, with the last one; values are rounded to six digits."""
    step = math.ceil(len(points) / max_points)
    return [[x, float(f"{y:.6g}")] for x, y in points[(len(points) - 1) % step :: step]]


def _parse_finite(cell: Any) -> float | None:
    try:
        return _finite_or_none(float(cell))
    except (TypeError, ValueError):
        return None


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def make_page(data: Mapping[str, Any], title: str, live: bool = False) -> str:
    """Return the whole page as HTML.

    Args:
        data: What `make_data` returns.
        title: Title and heading of the page.
        live: Let the page ask its server for new data every few seconds.
    """
    scripts = (*SCRIPTS, LIVE_SCRIPT) if live else SCRIPTS
    embedded = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    parts = {
        "title": html.escape(title),
        "style": (PAGE_FOLDER / "report.css").read_text(encoding="utf-8"),
        "script": "\n".join((PAGE_FOLDER / name).read_text(encoding="utf-8") for name in scripts),
        # Escaped so that no name can end the script element.
        "data": embedded.replace("<", "\\u003c"),
    }
    template = (PAGE_FOLDER / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
