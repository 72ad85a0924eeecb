"""One sheet of pictures for each kind of sight, with a row of panels for each of several nets."""

import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from retinue.evaluation.sight import pictures
from retinue.results.sight import VIEWS, WITH_QUERY
from retinue.results.sight.images import save_arrays
from retinue.results.sight.subject import Choices, choose_attention, load

# Number of test images of which means are taken, as in scripts/see.py
IMAGES = 64
# Number of characters in a line of a cell's caption
LINE = 30


def draw_sheets(
    runs: Mapping[str, Path],
    query: tuple[float, float] | None,
    device: torch.device,
    out: Mapping[str, Path],
    title: str,
) -> None:
    """Draw the first test image, as the nets of several runs see it, on one sheet for each kind.

    A net of which a kind cannot be shown has the reason in its row.

    Args:
        runs: Name of each row -> folder of its run. The runs have the same data.
        query: Place of the query, as in `Choices`.
        device: Device that computes.
        out: Kind of `VIEWS` -> picture to write; the data are written beside it as npz.
        title: Title of the sheets.
    """
    cells: dict[str, list[Sequence[pictures.Cell]]] = {kind: [] for kind in out}
    arrays: dict[str, dict] = {kind: {} for kind in out}
    titles: dict[str, str] = {}
    for name, run in runs.items():
        subject = load(run, [], IMAGES, device)
        for kind in out:
            try:
                # A row of attention shows the heads of one module, in the middle of the net.
                blocks = choose_attention(subject, None, 2)[:1] if kind == "attention" else None
                choices = Choices(pictures=1, query=query, blocks=blocks)
                view = VIEWS[kind](subject, choices)
            except ValueError as error:
                print(f"{kind} of {name}: {error}", file=sys.stderr)
                reason = textwrap.shorten(str(error), 6 * LINE)
                cells[kind].append([("\n".join([name, *textwrap.wrap(reason, LINE)]), subject.photos[0], None)])
                continue
            titles[kind] = view.title
            arrays[kind] |= {f"{name}/{key}": value for key, value in view.arrays.items()}
            first, *rest = view.cells
            cells[kind] += [[(f"{name}\n{first[0][0]}", *first[0][1:]), *first[1:]], *rest]
    for kind in out:
        mark = query if kind in WITH_QUERY else None
        pictures.draw_grid(out[kind], cells[kind], f"{titles.get(kind, kind)}, {title}", mark)
        save_arrays(out[kind].with_suffix(".npz"), arrays[kind])
