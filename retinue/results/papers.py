"""The papers' tables (papers/), and how near a figure of ours has to come to theirs."""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from retinue.utils.paths import CONF, PAPERS
from retinue.utils.suggestions import nearest

MODELS = CONF / "model"
DENSE = {"detection": "coco", "segmentation": "ade20k"}  # tables beside the classifiers', and their data
NOT_ARCHITECTURE = ("name", "drop_path_rate", "images_up_to", "dense")  # keys of a size in conf/model


def list_papers() -> list[str]:
    """The names that `read_paper` takes."""
    return sorted(path.stem for path in PAPERS.glob("*.yaml"))


def read_paper(name: str) -> dict[str, Any]:
    """A paper's facts: `title`, `year`, ..., and its tables as lists of rows.

    Raises:
        ValueError: the paper is not there.
    """
    path = PAPERS / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(
            f"paper={name} is not there.{nearest(name, list_papers())} There are: {', '.join(list_papers())}"
        )
    return _load(path)


@cache
def _load(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def tolerance(printed: float) -> float:
    """What a count may be off by from a table's figure: 1 %, or half of the figure's last digit."""
    digits = len(f"{printed:g}".partition(".")[2])
    return max(0.01 * abs(printed), 0.5 * 10**-digits)


def agrees(counted: float, printed: float) -> bool:
    """Whether a count is within the tolerance of a table's figure."""
    return abs(counted - printed) <= tolerance(printed) + 1e-9


def accuracy_agrees(percent: float, printed: float, interval: tuple[float, float] | None = None) -> bool:
    """Whether an accuracy is within 0.1 points of a table's, or its 95 % interval (in per cent) holds the table's."""
    return abs(percent - printed) <= 0.1 + 1e-9 or (interval is not None and interval[0] <= printed <= interval[1])


def model_choice(net: str, args: Mapping[str, Any], image_size: int | None) -> list[str]:
    """How the command line of `train.py` and `eval.py` names a row's net.

    Returns:
        `model=cswin`, `model.size=base_384`, and `data.image_size` and arguments of the net where they are its own.
    """
    args = {key: value for key, value in args.items() if key != "img_size"}  # of the data's images
    found: list[tuple[dict, list[str]]] = []
    for path in sorted(MODELS.glob("*.yaml")):
        for size, settings in (_load(path).get("sizes") or {}).items():
            own = {key: value for key, value in settings.items() if key not in NOT_ARCHITECTURE}
            if settings["name"] == net and all(args.get(key) == value for key, value in own.items()):
                found.append((own, [f"model={path.stem}", f"model.size={size}"]))
    own, choice = max(found, key=lambda each: len(each[0]), default=({}, ["model=timm", f"model.name={net}"]))
    pixels = [] if image_size in (224, None) else [f"data.image_size={image_size}"]
    return choice + pixels + [f"+model.args.{key}={_plain(value)}" for key, value in args.items() if key not in own]


def _plain(value: Any) -> str:
    """A value as Hydra's command line takes it."""
    return json.dumps(value, separators=(",", ":")).replace('"', "")


def experiments(paper: str) -> dict[str, dict[str, Any]]:
    """The rows that a training from scratch on ImageNet-1k reproduces, by the names of their experiments.

    Of each net and name the first row at the smallest images: larger ones and other data were for tuning. Rows trained
    by token labelling or distillation are left out, and nets whose drop path rate no conf/model states. A row's `train`
    (overrides of train.py beyond the model's own recipe) makes it an experiment in any case.
    """
    rows = [row for row in read_paper(paper)["variants"] if "net" in row and row.get("input")]
    named: dict[str, dict[str, Any]] = {}
    for row in rows:
        smallest = min(other["input"] for other in rows if row["net"] == other["net"] or row["name"] == other["name"])
        choice = dict(part.split("=", 1) for part in model_choice(row["net"], row.get("args", {}), row["input"]))
        scratch = (
            row["input"] == smallest
            and row["top1"] is not None
            and re.fullmatch("(imagenet|in)-1k", row["pretrain"] or "ImageNet-1K", re.IGNORECASE)
            and not re.search("token label|distill", row["name"], re.IGNORECASE)
            and "model.size" in choice
            and row["net"] not in (other["net"] for other in named.values())
        )
        if scratch or "train" in row:
            size = str(choice.get("model.size", row["net"]))
            said = row["input"] == smallest or str(row["input"]) in size
            suffix = "" if said else f"_{row['input']}"
            named[f"{paper}/{size}{suffix}_in1k"] = row
    return named


def dense_experiments(paper: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """The rows of a paper's detectors and segmentors that have a `train`, each with its table, by their experiments'
    names; such a row gets the `net` and `args` of the variant that its `backbone` names."""
    facts = read_paper(paper)
    variants = {row["name"]: row for row in reversed(facts["variants"]) if "net" in row}
    named: dict[str, tuple[str, dict[str, Any]]] = {}
    for table in DENSE:
        for row in facts.get(table, []):
            if "train" not in row:
                continue
            variant = variants[row["backbone"]]
            row = row | {key: variant[key] for key in ("net", "args") if key in variant}
            size = model_choice(row["net"], row.get("args", {}), None)[1].partition("=")[2]
            head = row["train"][0].partition("=")[2]
            named[f"{paper}/{size}_{head}_{row['schedule'].lower()}"] = (table, row)
    return named
