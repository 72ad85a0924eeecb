"""The papers' tables (`papers/*.yaml`), and how close a figure of ours must be to the paper's figure."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from retinue.utils.command_line import to_text
from retinue.utils.paths import CONF, PAPERS
from retinue.utils.suggestions import nearest

MODELS = CONF / "model"
# The tables of detectors and of segmentors, with the name of their data in conf/data.
DENSE_DATA = {"detection": "coco", "segmentation": "ade20k"}
# Keys of a size in conf/model that are not arguments of the net's architecture.
NOT_ARCHITECTURE = ("name", "drop_path_rate", "images_up_to", "dense")
# Image size for which conf/model and conf/data need no override, in pixels.
DEFAULT_IMAGE_SIZE = 224
# Maximum difference between an accuracy and the paper's, in percentage points.
ACCURACY_TOLERANCE = 0.1
# Slack for the rounding errors of floating point, so that a difference of exactly the tolerance agrees.
ROUNDING = 1e-9


def list_papers() -> list[str]:
    """Return the names that `read_paper` takes."""
    return sorted(path.stem for path in PAPERS.glob("*.yaml"))


def read_paper(name: str) -> dict[str, Any]:
    """Return a paper's facts: `title`, `year`, ..., and its tables as lists of rows.

    Raises:
        ValueError: There is no such paper; the message names the nearest.
    """
    path = PAPERS / f"{name}.yaml"
    if not path.is_file():
        names = list_papers()
        raise ValueError(f"there is no paper={name}.{nearest(name, names)} There are: {', '.join(names)}")
    return _load(path)


@cache
def _load(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def tolerance(printed: float) -> float:
    """Return by how much a count may differ from a printed figure: by 1 %, or half of the figure's last digit."""
    digits = len(f"{printed:g}".partition(".")[2])
    return max(0.01 * abs(printed), 0.5 * 10**-digits)


def agrees(counted: float, printed: float) -> bool:
    """Tell whether a count is within the tolerance of a printed figure."""
    return abs(counted - printed) <= tolerance(printed) + ROUNDING


def accuracy_agrees(percent: float, printed: float, interval: tuple[float, float] | None = None) -> bool:
    """Tell whether an accuracy agrees with a printed one.

    Args:
        percent: Our accuracy in %.
        printed: The paper's accuracy in %.
        interval: The 95 % interval of ours in %; an accuracy in it agrees, too. Default: none.
    """
    if abs(percent - printed) <= ACCURACY_TOLERANCE + ROUNDING:
        return True
    return interval is not None and interval[0] <= printed <= interval[1]


def model_choice(net: str, args: Mapping[str, Any], image_size: int | None) -> list[str]:
    """Return the overrides with which `train.py` and `eval.py` name a row's net.

    Args:
        net: Registry name of the net.
        args: Arguments of the net; `img_size` is left out, since the data's `image_size` sets it.
        image_size: Side of the images in pixels; None if the row does not tell it.

    Returns:
        `model=cswin`, `model.size=base_384`, then `data.image_size` if it is not the default, and the arguments that
        the size in conf/model does not set.
    """
    args = {key: value for key, value in args.items() if key != "img_size"}
    # The net is named by the size in conf/model that agrees with the arguments and sets the most of them.
    chosen: dict[str, Any] | None = None
    choice = ["model=timm", f"model.name={net}"]
    for path in sorted(MODELS.glob("*.yaml")):
        for size, settings in (_load(path).get("sizes") or {}).items():
            if settings["name"] != net:
                continue
            architecture = {key: value for key, value in settings.items() if key not in NOT_ARCHITECTURE}
            fits = all(args.get(key) == value for key, value in architecture.items())
            if fits and (chosen is None or len(architecture) > len(chosen)):
                chosen, choice = architecture, [f"model={path.stem}", f"model.size={size}"]
    if image_size not in (DEFAULT_IMAGE_SIZE, None):
        choice.append(f"data.image_size={image_size}")
    missing = {key: value for key, value in args.items() if chosen is None or key not in chosen}
    return choice + [f"+model.args.{key}={to_text(value)}" for key, value in missing.items()]
