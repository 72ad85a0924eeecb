"""Pictures of what a net looks at: images with heat maps over them, matrices, and curves by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retinue.evaluation.plots import BLUE, GREEN, GREY, LIGHT_BLUE, ORANGE, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Caption, image (h, w, 3) with values from 0 to 1 or None, and heat map (H, W) at least 0 or None
Cell = tuple[str, np.ndarray | None, np.ndarray | None]
COLOURS = (BLUE, ORANGE, GREEN, LIGHT_BLUE, GREY)
# Largest number of curves that a legend names.
MAX_NAMED = 12


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def draw_grid(
    path: Path,
    cells: Sequence[Sequence[Cell]],
    title: str,
    mark: tuple[float, float] | None = None,
) -> None:
    """Draw a grid of images, each with a heat map over it.

    Args:
        path: File to write.
        cells: Rows of cells, which may differ in length. A map without an image has its own colours.
        title: Title of the picture.
        mark: Place whose pixel or token is marked in each cell, as shares of the height and width.
    """
    rows, columns = len(cells), max(len(row) for row in cells)
    figure = _figure(1.7 * columns, 1.9 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, line in zip(cells, axes, strict=True):
        for axis in line:
            axis.axis("off")
        for (caption, image, heat), axis in zip(row, line, strict=False):
            extent = (0.0, 1.0, 1.0, 0.0)
            if image is not None:
                axis.imshow(image, extent=extent, interpolation="nearest")
            if heat is not None:
                alpha = 1.0 if image is None else 0.65
                # A map of equal values has the colour in the middle of the scale.
                top = max(float(heat.max()), 2 * float(heat.mean()), 1e-12)
                axis.imshow(heat, extent=extent, cmap="inferno", alpha=alpha, vmin=0, vmax=top, interpolation="nearest")
            axis.set_title(caption, fontsize=7)
            shown = heat if heat is not None else image
            if mark is not None and shown is not None:
                y, x = (
                    (min(int(share * side), side - 1) + 0.5) / side
                    for share, side in zip(mark, shown.shape, strict=False)
                )
                axis.plot([x], [y], marker="x", color="cyan", markersize=6, markeredgewidth=1.5)
            axis.set_xlim(0, 1)
            axis.set_ylim(1, 0)
    figure.suptitle(title, fontsize=8)
    save_figure(figure, path)


def draw_matrix(path: Path, matrix: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str) -> None:
    """Draw a matrix of values from 0 to 1 with the names of its rows and columns."""
    side = 0.28
    figure = _figure(3 + side * len(columns), 2.2 + side * len(rows))
    axis = figure.subplots()
    picture = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=6)
    axis.set_yticks(range(len(rows)), rows, fontsize=6)
    figure.colorbar(picture, shrink=0.8)
    figure.suptitle(title, fontsize=8)
    save_figure(figure, path)


def draw_curves(path: Path, panels: Mapping[str, Mapping[str, Any]], x: Sequence[Any], title: str, x_name: str) -> None:
    """Draw one panel of curves for each quantity.

    Args:
        path: File to write.
        panels: Name of each quantity -> name of each curve -> its values, as many as `x` has or fewer.
        x: Numbers or names along the horizontal axis.
        title: Title of the picture.
        x_name: Name of the horizontal axis.
    """
    figure = _figure(4.2 * len(panels), 3.6)
    named = [str(value) for value in x] if any(isinstance(value, str) for value in x) else None
    for axis, (quantity, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, (name, values) in enumerate(curves.items()):
            places = list(range(len(values))) if named else list(x)[: len(values)]
            axis.plot(places, values, marker="o", markersize=3, label=name, color=_colour(i, len(curves)))
        if named:
            axis.set_xticks(range(len(named)), named, rotation=90, fontsize=6)
        axis.set_xlabel(x_name)
        axis.set_ylabel(quantity)
        axis.grid(alpha=0.3)
        if 1 < len(curves) <= MAX_NAMED:
            axis.legend(fontsize=6)
    figure.suptitle(title, fontsize=8)
    save_figure(figure, path)


def draw_bars(path: Path, panels: Mapping[str, Sequence[float]], names: Sequence[str], title: str) -> None:
    """Draw one panel of horizontal bars for each quantity, with the first name at the top."""
    figure = _figure(4.5 * len(panels), 1.2 + 0.2 * len(names))
    for axis, (quantity, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axis.barh(range(len(names)), values, color=[ORANGE if value < 0 else BLUE for value in values])
        axis.set_yticks(range(len(names)), names, fontsize=6)
        axis.invert_yaxis()
        axis.axvline(0, color=GREY, linewidth=0.8)
        axis.set_xlabel(quantity)
    figure.suptitle(title, fontsize=8)
    save_figure(figure, path)


def _colour(index: int, number: int) -> Any:
    if number <= len(COLOURS):
        return COLOURS[index]
    import matplotlib

    return matplotlib.colormaps["viridis"](index / max(number - 1, 1))
