"""How what `benchmark_ops.py` measures grows with the image: fitted, and drawn."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from retinue.benchmarks.timing import Row
from retinue.utils.files import replacing

FITTED_FROM = 512**2  # pixels: below, launches of kernels and what fits a cache count more than tokens


def exponents(rows: Sequence[Row]) -> list[Row]:
    """Powers of the number of tokens that time and memory grow with, from 512 pixels on, of what has several sizes."""
    groups: dict[tuple, list[Any]] = {}
    for row in rows:
        if int(row["pixels"] or 0) >= FITTED_FROM:
            groups.setdefault((row["series"], row["what"], row["direction"], row["batch"]), []).append(row)
    fitted = []
    for (series, what, direction, _), points in groups.items():
        pixels = [row["pixels"] for row in points]
        if len(set(pixels)) > 1:
            time, memory = (
                float(np.polyfit(np.log(pixels), np.log([row[key] for row in points]), 1)[0])
                if all(row[key] for row in points)
                else None
                for key in ("median_ms", "peak_mb")
            )
            fitted.append(
                {"series": series, "what": what, "direction": direction, "time": time, "memory": memory,
                 "pixels": f"{min(pixels)} to {max(pixels)}"}
            )  # fmt: skip
    return fitted


def plot(path: str, rows: Sequence[Row]) -> None:
    """ms an image against pixels, both logarithmic: a panel for each series and direction."""
    from matplotlib.figure import Figure

    panels: dict[tuple, dict[Any, list[Any]]] = {}
    for row in rows:
        panel = panels.setdefault((row["series"], row["direction"]), {})
        panel.setdefault(row["what"], []).append(row)
    figure = Figure((6 * 2, 4 * -(-len(panels) // 2)), dpi=100, layout="constrained")
    axes = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat
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
    for ax in axes:
        ax.set_axis_off()
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary)
