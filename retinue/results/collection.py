"""The runs below a folder: find them, choose some of them, and group the ones that differ only in their seed."""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
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
from retinue.utils.command_line import to_text
from retinue.utils.suggestions import nearest

log = logging.getLogger(__name__)

# Top-level keys that differ between the runs of one config, with their values, in the text of a config.yaml.
RUN_KEYS = re.compile(r"^(?:seed|run_dir):.*\n?(?: .*\n?)*", re.MULTILINE)
# Name of a run's folder, below <task>/<data>/<model>.
FOLDER_NAME = re.compile(r"[0-9a-f]{8}-s(\d+)")
# Maximum number of the runs' values that an error lists.
MAX_LISTED_VALUES = 20


@dataclass
class Run:
    """A run folder, finished or not, or the folder of an evaluation (`eval.py`).

    Attributes:
        folder: The folder.
        result: Contents of `result.json`; None if there is none or it cannot be read.
        failure: Why there is no result; None if that is not known.
        status: One of `retinue.runs.status.STATES`. A run without a result or a failure is `stopped`, even if a
            process is training it at the moment: the run's lock is not looked at here.
    """

    folder: Path
    result: dict[str, Any] | None
    failure: str | None
    status: str

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config of the run, or of the run that an evaluation evaluates; {} if there is none."""
        return self._config[0] | self._config[3]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The run's identity with dotted names such as `recipe.optimizer.lr`, without the seed.

        An evaluation has its own image size, and a probing its own probe and feature.
        """
        if self.result and self.kind == "evaluation" and "image_size" in self.result:
            probing = {name: self.result[name] for name in ("probe", "feature", "panel") if name in self.result}
            probing |= {f"probe.{name}": value for name, value in flatten(self.result.get("settings", {}))}
            return self._config[1] | {"data.image_size": self.result["image_size"]} | probing
        return self._config[1]

    @cached_property
    def _config(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The config without `RUN_KEYS`, its identity, all its values by name, and the values of `RUN_KEYS`."""
        path = self.config_path
        try:
            text = path.read_text(encoding="utf-8")
            return *_parse(RUN_KEYS.sub("", text)), _load("".join(RUN_KEYS.findall(text)))
        except FileNotFoundError:
            return {}, {}, {}, {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            log.warning("%s cannot be read: %s; the run counts without its settings", path, _one_line(error))
            return {}, {}, {}, {}

    @property
    def config_path(self) -> Path:
        """Path of `config.yaml`, which an evaluation shares with the run that it evaluates."""
        return (self.folder.parent.parent if self.kind == "evaluation" else self.folder) / CONFIG

    @property
    def kind(self) -> str:
        """`training` or `evaluation`."""
        return "evaluation" if self.result and "weights" in self.result else "training"

    @cached_property
    def values(self) -> dict[str, Any]:
        """All values of the run by name: settings, fields of the result, metrics (`test/top1`), kind and status."""
        config, result = self.config, self.result or {}
        names: dict[str, Any] = {"seed": config["seed"]} if "seed" in config else {}
        for key in ("task", "data"):
            if isinstance(section := config.get(key), dict) and section.get("name"):
                names[key] = section["name"]
        if isinstance(config.get("model"), dict):
            names["model"] = self.settings.get("model.name") or self.folder.parent.name
        if not config and (match := FOLDER_NAME.fullmatch(self.folder.name)):
            # The run failed before it wrote a config.
            task, data, net = self.folder.absolute().parts[-4:-1]
            names = {"task": task, "data": data, "model": net, "seed": int(match[1])}
        fields = {key: value for key, value in (result | result.get("metrics", {})).items() if _is_scalar(value)}
        return {**self._config[2], **self.settings, **names, **fields, "kind": self.kind, "status": self.status}

    def number(self, name: str) -> float | None:
        """Return the value of this name if it is a number, else None."""
        value = self.values.get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None


# Cached, since many runs share a config.
@cache
def _parse(text: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return a config, its identity by dotted names, and all its values by dotted names except the menus of sizes."""
    config = _load(text)
    values = {name: value for name, value in flatten(config) if ".sizes." not in name}
    return config, dict(flatten(identity(config))), values


def _load(text: str) -> dict[str, Any]:
    tree = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
    if not isinstance(tree, dict):
        raise ValueError("it is not a mapping")
    return tree


def find_runs(folder: str | Path) -> list[Run]:
    """Return all runs and evaluations below a folder, in the order of their paths.

    A run whose result is corrupt or half-written has the status `unreadable`.

    Raises:
        ValueError: The folder does not exist, or holds no run.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder}")
    runs = []
    for path, folders, files in os.walk(folder):
        run_files = {CONFIG, RESULT, FAILED}.intersection(files)
        if run_files:
            runs.append(_read(Path(path), run_files))
        # The folders of a run (checkpoints, logs) hold no other run, except for the evaluations of this run.
        visible = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in visible if name == "evaluation" or not run_files]
    if not runs:
        raise ValueError(f"no run lies below {folder}: a run's folder holds {CONFIG} or {RESULT}")
    return runs


def read_run(folder: Path) -> Run:
    """Return the run or evaluation of a folder."""
    return _read(folder, {name for name in (CONFIG, RESULT, FAILED) if (folder / name).exists()})


def _read(folder: Path, run_files: set[str]) -> Run:
    """Return the run of a folder that holds these of the files `CONFIG`, `RESULT` and `FAILED`."""
    if RESULT in run_files:
        try:
            result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            if not isinstance(result, dict) or not isinstance(result.get("metrics"), dict):
                raise ValueError("it holds no metrics")
            return Run(folder, result, None, "finished")
        except (OSError, ValueError) as error:
            reason = f"{RESULT} cannot be read: {_one_line(error)}; remove it and start the run's command again"
            return Run(folder, None, reason, "unreadable")
    if FAILED in run_files:
        try:
            reason = str(json.loads((folder / FAILED).read_text(encoding="utf-8"))["reason"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{FAILED} cannot be read: {_one_line(error)}; remove it"
        return Run(folder, None, reason, "failed")
    return Run(folder, None, None, "stopped")


def choose_runs(runs: Sequence[Run], where: Mapping[str, str]) -> list[Run]:
    """Return the runs that meet all conditions.

    Args:
        runs: The runs to choose from.
        where: Wanted value by name; alternatives (`a,b`) and patterns (`swin_*`) are permitted.

    Raises:
        ValueError: No run has a value of such a name, or no run meets a condition.
    """
    for name, wanted in where.items():
        check_name(name, runs)
        values = list(dict.fromkeys(to_text(run.values[name]) for run in runs if name in run.values))
        runs = [run for run in runs if name in run.values and _matches(run.values[name], wanted)]
        if not runs:
            listed = ", ".join(values[:MAX_LISTED_VALUES])
            raise ValueError(f"no run has {name}={wanted}.{nearest(wanted, values)} There are: {listed}")
    return list(runs)


def _matches(value: Any, wanted: str) -> bool:
    text = to_text(value)
    # The whole of `wanted` counts as well, since the text of a list has commas.
    alternatives = [wanted, *wanted.split(",")]
    return any(
        text == alternative or fnmatchcase(text, alternative) or _is_same_number(value, alternative)
        for alternative in alternatives
    )


def _is_same_number(value: Any, text: str) -> bool:
    try:
        return isinstance(value, int | float) and float(text) == value
    except ValueError:
        return False


@dataclass
class Group:
    """Runs that have the same values of some names.

    Attributes:
        key: The shared values by name, as text.
        runs: The runs.
    """

    key: dict[str, str]
    runs: list[Run]

    def summary(self, name: str) -> Summary | None:
        """Summarise the numbers of this name over the runs that have one; None if no run has."""
        numbers = [number for run in self.runs if (number := run.number(name)) is not None]
        return summarise(numbers) if numbers else None

    def count_by_status(self) -> dict[str, int]:
        """Return the number of runs with each status that occurs, in the order of `STATES`."""
        counts = {status: sum(run.status == status for run in self.runs) for status in STATES}
        return {status: count for status, count in counts.items() if count}


def group_runs(runs: Sequence[Run], by: Sequence[str] | None = None) -> list[Group]:
    """Group the runs that have the same values of the names in `by`, and are of the same kind.

    Args:
        runs: The runs to group.
        by: Names of values. Default: the names that tell runs apart which differ in more than the seed.

    Raises:
        ValueError: No run has a value of a name in `by`.
    """
    if by is None:
        names = distinguishing_names(runs)
    else:
        for name in by:
            check_name(name, runs)
        names = list(by)
        # Evaluations and trainings are not averaged: an evaluation repeats the metrics of its run, or has other images.
        if "kind" not in names and len({run.kind for run in runs}) > 1:
            names.insert(0, "kind")
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(_key(run, names), []).append(run)
    return [Group(dict(zip(names, key, strict=True)), members) for key, members in groups.items()]


def check_name(name: str, runs: Sequence[Run]) -> None:
    """Raise a ValueError with the nearest name if no run has a value called `name`."""
    names = dict.fromkeys(known for run in runs for known in run.values)
    if name not in names:
        raise ValueError(f"no run has {name!r}.{nearest(name, names)}")


def distinguishing_names(runs: Sequence[Run]) -> list[str]:
    """Return the names that tell runs apart which differ in more than the seed.

    These are `kind`, `task` and `data` where they differ, `model`, and then settings, chosen greedily: each next one
    splits the groups that are left into the most parts.
    """
    names = [name for name in ("kind", "task", "data") if len({_key(run, [name]) for run in runs}) > 1] + ["model"]
    # For each key, one run for all that share their settings (the object that `_parse` caches).
    representatives: dict[tuple[str, ...], dict[int, Run]] = {}
    for run in runs:
        if run.settings:
            representatives.setdefault(_key(run, names), {}).setdefault(id(run.settings), run)
    parts = [list(part.values()) for part in representatives.values()]
    chosen: list[str] = []
    while parts := [part for part in parts if len(part) > 1]:
        settings = dict.fromkeys(name for part in parts for run in part for name in run.settings)
        splits = {name: sum(len({_key(run, [name]) for run in part}) - 1 for part in parts) for name in settings}
        best = max(splits, key=lambda name: splits[name], default=None)
        if best is None or not splits[best]:
            break
        chosen.append(best)
        parts = [subset for part in parts for subset in _split(part, best)]
    return names + chosen


def _split(runs: Sequence[Run], name: str) -> list[list[Run]]:
    """Return the runs in lists, one for each value of the name."""
    subsets: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        subsets.setdefault(_key(run, [name]), []).append(run)
    return list(subsets.values())


def _key(run: Run, names: Sequence[str]) -> tuple[str, ...]:
    """Return the run's values of these names as text; "" for a value that it lacks."""
    return tuple(to_text(run.values[name]) if name in run.values else "" for name in names)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _one_line(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split())
