"""How time and memory grow with the size of the image: fitted exponents, and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retinue.benchmarks.timing import Row
from retinue.utils.arithmetic import ceil_div
from retinue.utils.files import replacing

# Pixels. With fewer, launching kernels and the size of caches matter more than the number of tokens.
MIN_FITTED_PIXELS = 512**2


def exponents(rows: Sequence[Row]) -> list[Row]:
    """Fit time and memory as powers of the number of tokens.

    Returns:
        The exponents, one row for each series, formulation, direction and batch that was measured at two or more sizes
        of at least `MIN_FITTED_PIXELS`; `memory` is None where it was not measured.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["pixels"] is not None and int(row["pixels"]) >= MIN_FITTED_PIXELS:
            groups.setdefault((row["series"], row["what"], row["direction"], row["batch"]), []).append(row)
    fitted: list[Row] = []
    for (series, what, direction, _), points in groups.items():
        pixels = [int(row["pixels"]) for row in points if row["pixels"] is not None]
        if len(set(pixels)) > 1:
            fitted.append(
                {
                    "series": series,
                    "what": what,
                    "direction": direction,
                    "time": _exponent(pixels, [row["median_ms"] for row in points]),
                    "memory": _exponent(pixels, [row["peak_mb"] for row in points]),
                    "pixels": f"{min(pixels)} to {max(pixels)}",
                }
            )
    return fitted


def _exponent(pixels: Sequence[int], costs: Sequence[Any]) -> float | None:
    """Return the slope of the logarithms, or None if a cost is missing or 0."""
    return float(np.polyfit(np.log(pixels), np.log(costs), 1)[0]) if all(costs) else None


def plot(path: str | Path, rows: Sequence[Row]) -> None:
    """Plot milliseconds per image against pixels, both logarithmic: a panel for each series and direction."""
    from matplotlib.figure import Figure

    panels: dict[tuple, dict[Any, list[Any]]] = {}
    for row in rows:
        panel = panels.setdefault((row["series"], row["direction"]), {})
        panel.setdefault(row["what"], []).append(row)
    panel_rows = ceil_div(len(panels), 2)
    figure = Figure((6 * 2, 4 * panel_rows), dpi=100, layout="constrained")
    axes = figure.subplots(panel_rows, 2, squeeze=False).flat
    for (series, direction), lines in panels.items():
        ax = next(axes)
        for what, points in lines.items():
            points = sorted(points, key=lambda row: row["pixels"])
            ms = [row["median_ms"] / row["batch"] for row in points]
            ax.plot([row["pixels"] for row in points], ms, marker="o", label=what)
        ax.set(title=f"{series}\n{direction}", xlabel="pixels", ylabel="ms an image", xscale="log", yscale="log")
        ax.title.set_fontsize("small")
        ax.legend(fontsize="x-small")
        ax.grid(alpha=0.3)
    for unused_ax in axes:
        unused_ax.set_axis_off()
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}", fontsize="small")
    with replacing(path) as temporary_path:
        figure.savefig(temporary_path)
