"""Read `classifier_map`: which class of the weights' classifier is which class of the data.

It is one of

- the name of one of timm's lists of ImageNet's classes, such as `imagenet22k`: the classes of the weights by their
  WordNet ids;
- the `classes.json` of a run: the classes of the weights by name;
- a text file with a number on each line: the row of the classifier for each class of the data, -1 for none.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.classes import Classes
from datamodules.imagenet import synsets
from models.classifier_rows import ClassifierRows

log = logging.getLogger(__name__)


def read_classifier_map(source: str | None, datamodule: Any) -> ClassifierRows | None:
    """Return the rows of the weights' classifier for the classes of the data, or None without a source.

    A class that the weights do not know keeps its initial weights; a warning counts these classes.

    Args:
        source: Value of `classifier_map`.
        datamodule: The data module, which knows its classes.

    Raises:
        ValueError: There is no such file or list, the file has another number of lines than the data have classes, a
            line is no number, a class is named twice, or no class of the data is known.
    """
    if source is None:
        return None
    path, names = Path(source).expanduser(), list(datamodule.class_names)
    if path.suffix == ".json":
        known, wanted = list(Classes.read(path).names), names
    elif path.is_file():
        return ClassifierRows(_read_rows(path, len(names)), None, source)
    else:
        known, wanted = _synsets(source), list(getattr(datamodule, "wnids", names))
    if len(set(known)) < len(known):
        raise ValueError(f"classifier_map={source} has a class twice")
    row_of = {name: row for row, name in enumerate(known)}
    rows = [row_of.get(name, -1) for name in wanted]
    unknown = [name for name, row in zip(names, rows, strict=True) if row < 0]
    if len(unknown) == len(names):
        raise ValueError(
            f"classifier_map={source} has none of the data's classes, which are {wanted[0]}, ...; its own are "
            f"{known[0]}, ..."
        )
    if unknown:
        log.warning(
            "%d of the data's %d classes are not in classifier_map=%s and start anew: %s",
            len(unknown), len(names), source, ", ".join(unknown[:3] + ["..."] * (len(unknown) > 3)),
        )  # fmt: skip
    return ClassifierRows(rows, len(known), source)


def _synsets(source: str) -> Sequence[str]:
    try:
        return synsets(source)
    except ValueError as error:
        raise ValueError(f"classifier_map={source} is neither a file nor a list of classes: {error}") from error


def _read_rows(path: Path, classes: int) -> list[int]:
    lines = path.read_text(encoding="utf-8-sig").split()
    if len(lines) != classes:
        raise ValueError(
            f"classifier_map={path} has {len(lines)} numbers, and the data have {classes} classes: it needs one number "
            "for each class"
        )
    for number, line in enumerate(lines, start=1):
        if not line.removeprefix("-").isdecimal() or int(line) < -1:
            raise ValueError(
                f"classifier_map={path}, line {number}: expected a row of the classifier, such as 0, or -1 for none, "
                f"not {line!r}"
            )
    return [int(line) for line in lines]
