"""The classes of a data set, as a run keeps them to predict without its data."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from retinue.utils.files import write_text


@dataclass(frozen=True)
class Classes:
    """Names and numbers of K classes, by label.

    Attributes:
        names: readable name of each class.
        ids: number that the data's files use for each class: a label, a category id, or a value in a mask.
        subset: labels of the only logits that evaluation compares; None compares all logits.
        num_things: number of the classes that are things, which come first; None for data that are not panoptic.
    """

    names: Sequence[str]
    ids: Sequence[int]
    subset: Sequence[int] | None = None
    num_things: int | None = None

    def write(self, path: Path) -> None:
        """Write the classes as JSON, whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Classes":
        """Read the file that `write` wrote.

        Raises:
            ValueError: if the file is damaged.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names, ids, subset = [str(name) for name in content["names"]], content["ids"], content["subset"]
            # Runs of earlier versions have no number of things.
            num_things = content.get("num_things")
            numbers = [*ids, *([] if subset is None else subset), *([] if num_things is None else [num_things])]
            if len(names) != len(ids) or not names or not all(isinstance(number, int) for number in numbers):
                raise ValueError("it needs one whole number for each name")
            return cls(names, ids, subset, num_things)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, which names the run's classes, cannot be read: {error}") from None
