"""Many runs at once: what lies below a folder, which of it is chosen, and which runs differ in their seed alone."""

import csv
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from retinue.evaluation.statistics import Summary, summarise
from retinue.runs.identity import flatten, identity
from retinue.runs.result_file import CONFIG, FAILED, RESULT
from retinue.runs.status import STATES
from retinue.utils.suggestions import nearest

log = logging.getLogger(__name__)

OWN_KEYS = re.compile(r"^(?:seed|run_dir):.*\n?(?: .*\n?)*", re.MULTILINE)  # in which the runs of a config differ
OWN_NAME = re.compile(r"[0-9a-f]{8}-s(\d+)")  # of a run's folder, below <task>/<data>/<model>
RATES = ("top1", "top5", "mean_class_accuracy", "ece", "miou", "box_ap", "mask_ap")  # fractions of 1, shown in %
LESS_IS_BETTER = ("loss", "ece", "params", "macs", "seconds", "memory_mb", "peak_mb", "ms_per_image")


@dataclass
class Run:
    """A run folder, finished or not; also the folder of an evaluation (`eval.py`).

    Args:
        result: what `result.json` holds, if it can be read.
        failure: why there is no result, where that is known.
        status: one of `retinue.runs.status.STATES`. A run without a result or a failure is `stopped`, even if a
            process is training it at the moment: the run's lock is not looked at here.
    """

    folder: Path
    result: dict[str, Any] | None
    failure: str | None
    status: str

    @cached_property
    def config(self) -> dict[str, Any]:
        """The run's config, resolved; for an evaluation that of the run which it evaluates. {} if there is none."""
        return self._config[0] | self._config[3]

    @property
    def settings(self) -> dict[str, Any]:
        """The run's identity by dotted names, such as `recipe.optimizer.lr`; the seed is left out."""
        return self._config[1]

    @cached_property
    def _config(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The config without the run's own keys, its settings, all its values by name, and the run's own keys."""
        path = self.config_path
        try:
            text = path.read_text(encoding="utf-8")
            return *_parse(OWN_KEYS.sub("", text)), _load("".join(OWN_KEYS.findall(text)))
        except FileNotFoundError:
            return {}, {}, {}, {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            log.warning("%s cannot be read: %s", path, _one_line(error))
            return {}, {}, {}, {}

    @property
    def config_path(self) -> Path:
        return (self.folder.parent.parent if self.kind == "evaluation" else self.folder) / CONFIG

    @property
    def kind(self) -> str:
        """`training` or `evaluation`."""
        return "evaluation" if self.result and "weights" in self.result else "training"

    @cached_property
    def values(self) -> dict[str, Any]:
        """All that is known of the run, by name: settings, the result's fields, its metrics (`test/top1`)."""
        config, result = self.config, self.result or {}
        names: dict[str, Any] = {"seed": config["seed"]} if "seed" in config else {}
        for key in ("task", "data"):
            if isinstance(section := config.get(key), dict) and section.get("name"):
                names[key] = section["name"]
        if isinstance(config.get("model"), dict):
            names["model"] = self.settings.get("model.name") or self.folder.parent.name
        if not config and (match := OWN_NAME.fullmatch(self.folder.name)):  # it failed before it had one
            task, data, net = self.folder.absolute().parts[-4:-1]
            names = {"task": task, "data": data, "model": net, "seed": int(match[1])}
        flat = {key: value for key, value in (result | result.get("metrics", {})).items() if _plain(value)}
        return {**self._config[2], **self.settings, **names, **flat, "kind": self.kind, "status": self.status}

    def number(self, name: str) -> float | None:
        value = self.values.get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None


@cache  # a sweep has thousands of runs, and far fewer configs
def _parse(text: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return a config, its identity by dotted names, and all its values by dotted names except the menus of sizes."""
    config = _load(text)
    values = {name: value for name, value in flatten(config) if ".sizes." not in name}
    return config, dict(flatten(identity(config))), values


def _load(text: str) -> dict[str, Any]:
    tree = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
    if not isinstance(tree, dict):
        raise ValueError("it is no mapping")
    return tree


def find_runs(folder: str | Path) -> list[Run]:
    """All runs and evaluations below `folder`, by path; one with a corrupt or half-written result is `unreadable`.

    Raises:
        ValueError: `folder` is missing, or holds no run.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder}")
    runs = []
    for path, folders, files in os.walk(folder):
        there = {CONFIG, RESULT, FAILED}.intersection(files)
        if there:
            runs.append(_read(Path(path), there))
        # a run's own folders (checkpoints, logs) hold no other run, except for its evaluations
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (not there or f == "evaluation"))
    if not runs:
        raise ValueError(f"no run lies below {folder}: a run's folder holds {CONFIG} or {RESULT}")
    return runs


def _read(folder: Path, there: set[str]) -> Run:
    if RESULT in there:
        try:
            result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            if not isinstance(result, dict) or not isinstance(result.get("metrics"), dict):
                raise ValueError("it holds no metrics")
            return Run(folder, result, None, "finished")
        except (OSError, ValueError) as error:
            return Run(folder, None, f"{RESULT} cannot be read: {_one_line(error)}", "unreadable")
    if FAILED in there:
        try:
            reason = str(json.loads((folder / FAILED).read_text(encoding="utf-8"))["reason"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{FAILED} cannot be read: {_one_line(error)}"
        return Run(folder, None, reason, "failed")
    return Run(folder, None, None, "stopped")


def choose(runs: Sequence[Run], conditions: Iterable[str]) -> list[Run]:
    """The runs that fit all `conditions`: `name=value`, with alternatives (`a,b`) and patterns (`swin_*`).

    Raises:
        ValueError: a condition has no `=` or a name that no run has; or no run fits.
    """
    for condition in conditions:
        name, equals, wanted = condition.partition("=")
        if not equals:
            raise ValueError(f"--where takes name=value, not {condition!r}")
        check_name(name, runs)
        found = list(dict.fromkeys(show(run.values[name]) for run in runs if name in run.values))
        runs = [run for run in runs if name in run.values and _fits(run.values[name], wanted)]
        if not runs:
            raise ValueError(f"no run has {condition}.{nearest(wanted, found)} There are: {', '.join(found[:20])}")
    return list(runs)


def _fits(value: Any, wanted: str) -> bool:
    text, either = show(value), [wanted, *wanted.split(",")]  # the whole, too: a list has commas
    return any(text == each or fnmatchcase(text, each) or _same_number(value, each) for each in either)


def _same_number(value: Any, text: str) -> bool:
    try:
        return isinstance(value, int | float) and float(text) == value
    except ValueError:
        return False


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return f"[{','.join(map(show, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {show(each)}' for key, each in value.items())}}}"
    return repr(value) if type(value) in (int, float) else json.dumps(value)


@dataclass
class Group:
    """Runs that have `key` in common."""

    key: dict[str, str]
    runs: list[Run]

    def summary(self, name: str) -> Summary | None:
        """Of the finished runs that have it; None where none has."""
        numbers = [number for run in self.runs if (number := run.number(name)) is not None]
        return summarise(numbers) if numbers else None

    def count(self) -> dict[str, int]:
        """Runs by status, finished ones first."""
        return {status: n for status in STATES if (n := sum(run.status == status for run in self.runs))}


def group(runs: Sequence[Run], by: Sequence[str] | None = None) -> list[Group]:
    """Runs of a kind with the same values of `by`; if not given, runs that differ in nothing but the seed.

    Raises:
        ValueError: no run has a name in `by`.
    """
    for name in by or ():
        check_name(name, runs)
    mixed = len({run.kind for run in runs}) > 1  # an evaluation repeats the figures of its run, or has other images
    keys = distinguishing(runs) if by is None else ["kind"] * (mixed and "kind" not in by) + [*by]
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(_values(run, keys), []).append(run)
    return [Group(dict(zip(keys, values, strict=True)), members) for values, members in groups.items()]


def check_name(name: str, runs: Sequence[Run]) -> None:
    """Raise a ValueError with the nearest name if no run has a value called `name`."""
    known = dict.fromkeys(known for run in runs for known in run.values)
    if name not in known:
        raise ValueError(f"no run has {name!r}.{nearest(name, known)}")


def distinguishing(runs: Sequence[Run]) -> list[str]:
    """`model`, what else of kind, task and data differs, and the fewest settings that tell all others apart."""
    keys = [name for name in ("kind", "task", "data") if len({_values(run, [name]) for run in runs}) > 1] + ["model"]
    cells: dict[tuple[str, ...], dict[int, Run]] = {}  # one run for all with the same settings
    for run in runs:
        if run.settings:
            cells.setdefault(_values(run, keys), {}).setdefault(id(run.settings), run)
    parts = [list(cell.values()) for cell in cells.values()]
    chosen: list[str] = []
    while parts := [part for part in parts if len(part) > 1]:
        names = dict.fromkeys(name for part in parts for run in part for name in run.settings)
        splits = {name: sum(len({_values(run, [name]) for run in part}) - 1 for part in parts) for name in names}
        best = max(splits, key=lambda name: splits[name], default=None)
        if best is None or not splits[best]:
            break
        chosen.append(best)
        parts = [[run for run in part if _values(run, [best]) == value]
                 for part in parts for value in {_values(run, [best]) for run in part}]  # fmt: skip
    return keys + chosen


def _values(run: Run, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(show(run.values[name]) if name in run.values else "" for name in names)


def figures(runs: Sequence[Run]) -> list[str]:
    """The figure of each task, as `test/top1`; where a run's config does not tell it, its first test metric."""
    names = {}
    for run in runs:
        metrics = [name for name in (run.result or {}).get("metrics", {}) if run.number(name) is not None]
        figure = f"test/{run.settings.get('task.figure')}"
        rest = [name for name in metrics if name != "test/n"]
        names |= dict.fromkeys([figure] if figure in metrics else rest[:1])
    return list(names)


def unit(name: str, largest: float) -> tuple[str, float]:
    """What `name` is shown in, and what that is worth: `("%", 0.01)`. `largest` is the largest value to be shown."""
    if name.rpartition("/")[2] in RATES:
        return "%", 0.01
    if name in ("params", "macs"):
        return ("G", 1e9) if largest >= 1e9 else ("M", 1e6)
    return "", 1.0


def less_is_better(name: str) -> bool:
    return name.endswith(LESS_IS_BETTER)


def join_benchmarks(runs: Sequence[Run], path: str | Path) -> None:
    """Give the runs the speed and memory that `benchmark_models.py --csv` measured of their nets, as `inference_...`.

    Raises:
        ValueError: the file cannot be read, is not of that kind, or has a net in more than one setting.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("mode", "inference") == "inference"]
        speeds: dict[str, dict[str, float | None]] = {}
        for row in rows:
            if row["what"] in speeds:
                raise ValueError(f"{row['what']} has more than one row: --benchmarks takes one shape, dtype and device")
            speed = float(row["images_per_s"])
            peak = float(row["peak_mb"]) if row["peak_mb"] else None
            speeds[row["what"]] = {"inference_ms_per_image": 1000 / speed, "inference_images_per_s": speed,
                                    "inference_peak_mb": peak}  # fmt: skip
    except OSError as error:
        raise ValueError(f"--benchmarks {path}: {error.strerror}") from None
    except KeyError as error:
        raise ValueError(f"--benchmarks {path} has no column {error}; benchmark_models.py writes it") from None
    if not speeds:
        raise ValueError(f"--benchmarks {path} has no row of inference")
    for run in runs:
        run.values.update(speeds.get(str(run.values.get("model")), {}))


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _one_line(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split())
