"""Space of architectures of BossNAS: HyTra, hybrids of convolution and attention that reduce the map anywhere.

BossNAS: Li et al., ICCV 2021, arXiv:2103.12424. Written after the paper and what the authors' repository,
changlin31/BossNAS, computes; none of its code is here.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

STAGES = 4
# First stage, from 0, whose maps are small enough for attention.
ATTENTION_FROM = 2


class Choice(NamedTuple):
    """Choice for a layer: the stage of its map, from 0, and whether it is a convolution or attention."""

    stage: int
    conv: bool

    def __str__(self) -> str:
        return f"{self.stage + 1}{'c' if self.conv else 'a'}"


Path = tuple[Choice, ...]


def to_text(path: Path) -> str:
    """Return a path as text, such as `1c-2c-3a-3a`: the stage from 1, then c for convolution or a for attention."""
    return "-".join(map(str, path))


def from_text(text: str) -> Path:
    """Return the path that `to_text` wrote.

    Raises:
        ValueError: The text is no path.
    """
    if not re.fullmatch(r"[1-4][ca](-[1-4][ca])*", text):
        raise ValueError(f"a path is written as 1c-2c-3a-3a, not {text!r}")
    return tuple(Choice(int(part[0]) - 1, part[1:] == "c") for part in text.split("-"))


def paths(start: int, layers: int) -> list[Path]:
    """Return all paths of a block: each layer keeps the stage of the layer before, or goes on to the next one.

    Args:
        start: Stage of the map that the block reads.
        layers: Number of layers.
    """
    if not layers:
        return [()]
    return [
        (Choice(stage, conv), *rest)
        for stage in range(start, min(start + 2, STAGES))
        for conv in ((True, False) if stage >= ATTENTION_FROM else (True,))
        for rest in paths(stage, layers - 1)
    ]


def encoding(chosen: Sequence[Path]) -> list[list[int]]:
    """Return the argument `encoding` of `BossNet` for the paths of all blocks."""
    layers = [choice for path in chosen for choice in path]
    return [[int(choice.conv) for choice in layers if choice.stage == stage] for stage in range(STAGES)]
