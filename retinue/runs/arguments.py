"""Complete a command line before Hydra reads it: quotes around paths with brackets, and the choices for few images.

Hydra chooses the recipe while it composes, before it knows a data set's folder. A choice that depends on the number of
images is therefore added to the command line, where the user and the run's records can see it.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from retinue.utils.paths import CONF

# A data set with fewer training images is small: the schedules for COCO would end soon after their warm-up.
FEW_IMAGES = 2000
# Largest JSON file that is read to count its images, in bytes.
MAX_JSON = 200_000_000
# A value in which Hydra would take a bracket for the begin of a list, although it stands inside a path.
UNQUOTED_PATH = re.compile(r"([^=]+)=([^\[\](){}'\"\\,=]+[\[\]][^(){}'\"\\,=]*)")


def quote_brackets(arguments: Sequence[str]) -> list[str]:
    """Quote values such as /data/[2024]/a, which Hydra would refuse since a bracket begins a list."""
    return [re.sub(f"^{UNQUOTED_PATH.pattern}$", r"\1='\2'", argument) for argument in arguments]


def quote_paths(arguments: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Quote the values of keys that are paths, so that they may hold any character, such as `*`, `(` or an umlaut.

    Args:
        arguments: command line; a value in quotes stays as it is.
        keys: keys of paths.
    """
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in keys and value not in ("", "null") and not value.startswith(("'", '"')):
            value = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
        quoted.append(f"{key}{equals}{value}")
    return quoted


def choose_for_few_images(arguments: Sequence[str]) -> list[str]:
    """Add the small recipe, head and model to a command line of `train.py` whose data have few training images.

    This is for the data sets in `COUNTS`, which may be of any size. `data.kind=` on the command line decides instead;
    so does an experiment, and a recipe is kept. What is added is printed to standard error.
    """
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument and not argument.startswith("-"))
    data = given.get("data")
    if data not in COUNTS or "data.kind" in given or "experiment" in given:
        return list(arguments)
    try:
        section = yaml.safe_load((CONF / "data" / f"{data}.yaml").read_text(encoding="utf-8"))["data"]
        section |= {key.removeprefix("data."): yaml.safe_load(given[key]) for key in given if key.startswith("data.")}
        count = COUNTS[data](section)
    except (OSError, TypeError, KeyError, ValueError, yaml.YAMLError):
        # Hydra or the data module says what is wrong.
        return list(arguments)
    if count is None or count >= FEW_IMAGES:
        return list(arguments)
    added = ["data.kind=small"] if "recipe" in given else ["data.kind=small", f"recipe=small_{section['task']}"]
    print(
        f"data={data} has {count} training images, fewer than {FEW_IMAGES:,}: taking {' '.join(added)}, with a small "
        "head and model; data.kind=coco takes the full ones",
        file=sys.stderr,
    )
    # Hydra takes overrides that stand together only, so the added ones stand beside `data=`.
    position = list(arguments).index(f"data={data}") + 1
    return [*arguments[:position], *added, *arguments[position:]]


def _count_voc(section: Mapping[str, Any]) -> int:
    """Return the number of lines in the image sets of the training split."""
    count = 0
    for name in section["train"]:
        folder, set_name = Path(section["root"], name).expanduser().parent, Path(name).name
        text = (folder / "ImageSets/Main" / f"{set_name}.txt").read_text(encoding="utf-8-sig")
        count += sum(1 for line in text.splitlines() if line.strip())
    return count


def _count_coco(section: Mapping[str, Any]) -> int | None:
    """Return the number of images in the training annotations, or None if the file is too large to have few."""
    path = Path(section["root"], section["train_annotations"]).expanduser()
    if not path.is_file() or path.stat().st_size > MAX_JSON:
        return None
    return len(json.loads(path.read_text(encoding="utf-8-sig"))["images"])


def _count_yolo(section: Mapping[str, Any]) -> int:
    """Return the number of training images."""
    # The data modules import torch, which the overview of --help does without.
    from datamodules.yolo import list_split, read_config

    config = Path(section["root"], section["config"]).expanduser()
    return len(list_split(read_config(config), config, "train"))


def _count_csv(section: Mapping[str, Any]) -> int:
    """Return the number of images in the training file."""
    from datamodules.box_csv import read_boxes

    return len(read_boxes(Path(section["root"], section["train"]).expanduser(), section["columns"]))


# Data sets that may be of any size -> function that counts the training images.
COUNTS = {
    "voc": _count_voc,
    "coco_json": _count_coco,
    "coco_panoptic": _count_coco,
    "yolo": _count_yolo,
    "box_csv": _count_csv,
}
