"""All runs below a folder as one page: table, quality against cost, learning curves, each run's config and command.

    python scripts/report.py                                              # outputs -> report.html
    python scripts/report.py outputs --where data=cifar10 --out cifar10.html
    python scripts/report.py --benchmarks models.csv                      # speed and memory of inference

The page is one file that loads nothing: it can be mailed, and opens without a network. `--where` is that of collect.py;
`--benchmarks` takes the CSV of benchmark_models.py.
"""

import argparse
import csv
import html
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from retinue.results.collection import (
    OWN_KEYS,
    Group,
    Run,
    choose,
    figures,
    find_runs,
    group,
    join_benchmarks,
    less_is_better,
    unit,
)
from retinue.utils.errors import user_errors
from retinue.utils.files import replacing

PARTS = Path(__file__).resolve().parent / "report"
SCRIPTS = ("charts.js", "details.js", "report.js")
POINTS = 400_000  # of all curves together: some 8 MB
COSTS = {
    "macs": "MACs",
    "params": "Parameters",
    "inference_ms_per_image": "Latency, ms/image",
    "training_ms_per_image": "Training, ms/image",
    "inference_peak_mb": "Memory of inference, MB",
    "peak_memory_mb": "Memory of training, MB",
}
OTHERS = {"images_per_second": "Training, images/s", "epochs": "Epochs", "seconds": "Training, s"}
FACTS = ("device", "precision", "versions", "git_commit", "weights")


def make_data(runs: Sequence[Run], folder: Path) -> dict[str, Any]:
    """What the page shows, ready for JSON: numbers are finite or absent."""
    for run in runs:
        if speed := run.number("images_per_second"):
            run.values["training_ms_per_image"] = 1000 / speed
    groups = group(runs)
    metrics = [name for run in runs for name in (run.result or {}).get("metrics", {}) if run.number(name) is not None]
    tests = [name for name in dict.fromkeys([*figures(runs), *metrics]) if name != "test/n"]
    columns = [_column(name, runs) for name in [*tests, *COSTS, *OTHERS]]
    names = [column["name"] for column in columns]
    curves = {run.folder: read_curves(run.folder / "metrics.csv") for run in runs if run.kind == "training"}
    most = max(20, POINTS // max(1, sum(map(len, curves.values()))))
    curve_names = sorted({name for each in curves.values() for name in each}, key=_curve_order(figures(runs)))
    sets = Counter(_set(each) for each in groups for _ in each.runs)
    return {
        "folder": str(folder),
        "made": f"{datetime.now():%d %B %Y, %H:%M}",
        "counts": Counter(run.status for run in runs),
        "columns": columns,
        "curveColumns": [_column(name, runs) for name in curve_names],
        "curveFigure": next((name.partition("/")[2] for name in figures(runs)), None),
        "sets": [name for name, _ in sets.most_common()],
        "groups": [
            {
                "name": _name(each),
                "set": _set(each),
                "key": each.key,
                "config": _config(each.runs[0]),
                "stats": {name: [_finite(found.mean), _finite(found.ci95)] for name in names
                          if (found := each.summary(name)) and math.isfinite(found.mean)},
                "runs": [_run(run, names, curves.get(run.folder, {}), most) for run in each.runs],
            }
            for each in groups
        ],
    }  # fmt: skip


def _column(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    symbol, scale = unit(name, max((number for run in runs if (number := run.number(name)) is not None), default=0))
    heading = COSTS.get(name) or OTHERS.get(name) or name.removeprefix("test/")
    return {"name": name, "heading": heading, "unit": symbol, "scale": scale, "less": less_is_better(name),
            "cost": name in COSTS, "figure": name.startswith("test/")}  # fmt: skip


def _curve_order(best: Sequence[str]) -> Any:
    """Validation before training, the tasks' figures first."""
    quantities = [name.partition("/")[2] for name in best]
    return lambda name: (not name.startswith("val/"), name.partition("/")[2] not in quantities, name)


def _set(each: Group) -> str:
    """What may be compared in one chart: the same task on the same data."""
    values = each.runs[0].values
    if "data" not in values:
        return "unknown"
    return f"{values['data']} ({values.get('task', 'unknown task')}{', evaluated' * (values['kind'] == 'evaluation')})"


def _name(each: Group) -> str:
    settings = [f"{key.rpartition('.')[2]}={value}" for key, value in each.key.items()
                if key not in ("kind", "task", "data", "model") and value not in ("", "null")]  # fmt: skip
    return ", ".join([each.key["model"] or each.runs[0].folder.name, *settings])


def _config(run: Run) -> str:
    """The text of `config.yaml`, without the seed and the folder."""
    path = run.config_path
    return OWN_KEYS.sub("", path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else ""


def _run(run: Run, names: Sequence[str], curves: dict[str, list[list[float]]], most: int) -> dict[str, Any]:
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
        "curves": {name: thin(points, most) for name, points in curves.items()},
    }


def commands(run: Run) -> list[tuple[str, str]]:
    """What to type to go on with the run, or to train it again and to evaluate it: title and command."""
    if run.kind == "evaluation" or not run.config:
        return []
    source = shlex.quote(str(run.folder))

    def train(folder: str) -> str:
        value = folder if re.fullmatch(r"[\w./-]+", folder) else "'" + folder.replace("'", "\\'") + "'"
        into = f"{shlex.quote(f'hydra.run.dir={value}')} {shlex.quote(f'run_dir={value}')}"
        return f"python train.py --config-dir {source} --config-name config hydra.output_subdir=null {into}"

    if run.status != "finished":
        return [("Go on with it", train(str(run.folder)))]
    return [
        (
            "Train it again, in a new folder",
            train(str(Path("again", *run.folder.parts[-4:]))),
        ),  # not among its own kind
        ("Evaluate its best weights", f"python eval.py {shlex.quote(f'run={run.folder}')}"),
    ]


def read_curves(path: Path) -> dict[str, list[list[float]]]:
    """[epoch, value] pairs of each figure in `metrics.csv`; cells that are empty or not finite are passed over."""
    curves: dict[str, list[list[float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                if None in row.values():  # a kill may cut a line
                    continue
                epoch = _number(row.get("epoch"))
                for name, cell in row.items():
                    if name and "/" in name and epoch is not None and (value := _number(cell)) is not None:
                        curves.setdefault(name, []).append([epoch, value])
    except (OSError, csv.Error):
        return {}
    return curves


def thin(points: list[list[float]], most: int) -> list[list[float]]:
    """At most about `most` points, evenly taken, the last one always; figures to six digits."""
    every = math.ceil(len(points) / most)
    return [[x, float(f"{y:.6g}")] for x, y in points[(len(points) - 1) % every :: every]]


def _number(cell: Any) -> float | None:
    try:
        return _finite(float(cell))
    except (TypeError, ValueError):
        return None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def make_page(data: dict[str, Any], title: str) -> str:
    """The whole page."""
    embedded = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    parts = {
        "title": html.escape(title),
        "style": (PARTS / "report.css").read_text(encoding="utf-8"),
        "script": "\n".join((PARTS / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "data": embedded.replace("<", "\\u003c"),  # a name cannot end the script element
    }
    template = (PARTS / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Show runs on one page that loads nothing.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs"), help="of runs; outputs, if not given")
    parser.add_argument("--where", nargs="+", default=[], metavar="NAME=VALUE", help="only these; a,b and swin_* work")
    parser.add_argument("--benchmarks", type=Path, metavar="CSV", help="of benchmark_models.py")
    parser.add_argument("--title", default="Results")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    args = parser.parse_args(argv)

    runs = find_runs(args.folder)
    if args.benchmarks:
        join_benchmarks(runs, args.benchmarks)
    page = make_page(make_data(choose(runs, args.where), args.folder), args.title)
    with replacing(args.out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    with user_errors():
        main()
