"""Completeness of LVIS's annotations (arXiv:1908.03195, lvisdataset.org; API under BSD 2-Clause).

LVIS is federated: an image is annotated for a part of the categories only. Evaluation has to know which.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

# Keys of an image in an LVIS file; each is a list of category ids.
NEGATIVE, NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"
# Number of training images with a category: rare (at most 10), common (at most 100), frequent.
FREQUENCIES = ("r", "c", "f")


@dataclass(frozen=True)
class Federated:
    """Categories that were looked for in each image.

    Attributes:
        frequencies: `r`, `c` or `f` of each label. None if the file has no frequencies.
        negative: int64 (P, 2), pairs of an image's position and a label that was looked for and is not in the image.
        not_exhaustive: int64 (Q, 2), pairs of an image's position and a label of which the image may have more objects
            than are annotated.
    """

    frequencies: list[str] | None
    negative: np.ndarray
    not_exhaustive: np.ndarray

    def select(self, images: np.ndarray) -> "Federated":
        """Return the facts about the images for which `images`, bool (N,), is True."""
        positions = np.cumsum(images) - 1
        kept = {}
        for name in ("negative", "not_exhaustive"):
            pairs = getattr(self, name)
            pairs = pairs[images[pairs[:, 0]]]
            kept[name] = np.stack([positions[pairs[:, 0]], pairs[:, 1]], axis=1)
        return replace(self, **kept)

    def add_to(self, images: Sequence[dict], categories: Sequence[dict]) -> None:
        """Add LVIS's keys to images and categories in COCO's format, which are in the order of positions and labels."""
        ids = [category["id"] for category in categories]
        for key, pairs in ((NEGATIVE, self.negative), (NOT_EXHAUSTIVE, self.not_exhaustive)):
            for image in images:
                image[key] = []
            for position, label in pairs.tolist():
                images[position][key].append(ids[label])
        for category, frequency in zip(categories, self.frequencies or (), strict=False):
            category["frequency"] = frequency


def read_federated(
    images: Sequence[Any], categories: Sequence[Any], labels: Mapping[int, int], source: str
) -> Federated | None:
    """Read which categories were looked for in the images of an LVIS file; None for a file without these keys.

    Args:
        images: images of the file.
        categories: categories of the file.
        labels: label of each category id; categories without a label are left out.
        source: name of the file, for messages.

    Raises:
        ValueError: if some images have the keys and others have not, a list is not one of category ids, or a frequency
            is not r, c or f.
    """
    if not any(NEGATIVE in image for image in images):
        return None
    # Ids are compared as text, since what the file has in a list may not be hashable.
    ids = {str(category["id"]) for category in categories}
    pairs: dict[str, np.ndarray] = {}
    for key in (NEGATIVE, NOT_EXHAUSTIVE):
        rows = []
        for position, image in enumerate(images):
            found = image.get(key)
            if not (isinstance(found, list) and ids.issuperset(map(str, found))):
                expected = "expected a list of category ids of the file, as in LVIS"
                raise ValueError(f"{source}: image {image.get('id')} has {key!r} {found!r}: {expected}")
            rows += [(position, labels[id]) for id in found if id in labels]
        pairs[key] = np.array(rows, np.int64).reshape(-1, 2)
    frequency = {category["id"]: category.get("frequency") for category in categories}
    by_label = [frequency[id] for id in sorted(labels, key=lambda id: labels[id])]
    if set(frequency.values()) == {None}:
        return Federated(None, pairs[NEGATIVE], pairs[NOT_EXHAUSTIVE])
    for id, letter in frequency.items():
        if letter not in FREQUENCIES:
            raise ValueError(f"{source}: category {id} has the frequency {letter!r}: expected r, c or f")
    return Federated(by_label, pairs[NEGATIVE], pairs[NOT_EXHAUSTIVE])
