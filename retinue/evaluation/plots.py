"""Pictures of a run: confusion matrix, reliability diagram, learning curves.

matplotlib is imported when something is drawn, and used through its objects alone, without a global state or display.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retinue.evaluation.classification import CALIBRATION_BINS, Predictions, calibration_bins, calibration_gaps
from retinue.utils.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, LIGHT_BLUE, ORANGE, GREEN, GREY = "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#999999"  # of Okabe & Ito
STAGE_COLOURS = {"train": BLUE, "val": ORANGE, "test": GREEN}
MOST_NUMBERED, MOST_NAMED = 20, 60  # classes up to which a confusion matrix is legible with numbers, with names


def plot_confusion(path: str | Path, predictions: Predictions, class_names: Sequence[str]) -> None:
    """The confusion matrix of a classifier's images."""
    k = len(class_names)
    pairs = np.bincount(predictions.label * k + predictions.topk[:, 0], minlength=k * k).reshape(k, k)
    draw_confusion(path, pairs, class_names, "images")


def draw_confusion(path: str | Path, pairs: np.ndarray, class_names: Sequence[str], unit: str) -> None:
    """Row by row, the share of a class's images or pixels that went to each class.

    Args:
        pairs: (K, K), at [t, p] how many of class t were taken for p.
        unit: what was counted.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    k = len(class_names)
    shares = pairs / np.maximum(pairs.sum(1, keepdims=True), 1)

    side = 4 + 0.4 * min(k, MOST_NUMBERED) if k <= MOST_NUMBERED else 12
    figure = Figure((side + 1, side), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    # The root brings out what is seldom confused, which is most of what a good net confuses.
    cmap = "Blues" if k <= MOST_NAMED else "viridis"  # single pixels stand out from a dark ground
    image = axes.imshow(shares, cmap=cmap, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    figure.colorbar(image, ax=axes, aspect=40, label=f"share of the class's {unit}")
    axes.set(xlabel="predicted class", ylabel="true class", title=f"Confusion matrix, {pairs.sum():,} {unit}")
    if k <= MOST_NAMED:
        size = 9 if k <= MOST_NUMBERED else 6
        long = max(map(len, class_names)) > 2
        axes.set_xticks(
            range(k), class_names, fontsize=size, rotation=45 if long else 0, ha="right" if long else "center"
        )
        axes.set_yticks(range(k), class_names, fontsize=size)
    if k <= MOST_NUMBERED:
        for i, j in zip(*np.nonzero(pairs), strict=True):
            colour = "white" if shares[i, j] > 0.4 else "black"
            axes.text(j, i, f"{shares[i, j]:.2f}", ha="center", va="center", fontsize=8, color=colour)
    _save(figure, path)


def plot_reliability(path: str | Path, predictions: Predictions) -> None:
    """Accuracy against confidence, bin by bin (Guo et al. 2017), over a histogram of the confidences."""
    from matplotlib.figure import Figure

    bins = calibration_bins(predictions.confidence)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    used = counts > 0
    accuracy = np.bincount(bins, predictions.correct, CALIBRATION_BINS)[used] / counts[used]
    confidence = np.bincount(bins, predictions.confidence, CALIBRATION_BINS)[used] / counts[used]
    width = 1 / CALIBRATION_BINS
    centres = (np.arange(CALIBRATION_BINS) + 0.5) * width

    figure = Figure((5, 6), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    bars = {"width": width, "edgecolor": "white", "linewidth": 0.5}
    top.bar(centres[used], accuracy, color=LIGHT_BLUE, label="accuracy", **bars)
    gap = {"width": width, "facecolor": "none", "edgecolor": ORANGE, "hatch": "///", "linewidth": 0.8}
    top.bar(centres[used], confidence - accuracy, bottom=accuracy, label="gap to mean confidence", **gap)
    top.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="calibrated")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    error = np.abs(calibration_gaps(predictions)).sum()
    top.set(ylabel="accuracy", ylim=(0, 1), title=f"Expected calibration error {error:.4f}")
    bottom.bar(centres, counts / len(predictions), color=GREY, **bars)
    marks = {"accuracy": (predictions.correct.mean(), BLUE), "confidence": (predictions.confidence.mean(), ORANGE)}
    for name, (mean, colour) in marks.items():
        bottom.axvline(float(mean), color=colour, label=f"mean {name} {mean:.3f}")
    bottom.legend(frameon=False, fontsize="small")
    bottom.set(xlabel="confidence", ylabel="share of images", xlim=(0, 1))
    _save(figure, path)


def plot_curves(path: str | Path, metrics_csv: str | Path) -> None:
    """The learning curves of a run: a panel for each quantity of its `<stage>/<quantity>` columns, stages together.

    Args:
        metrics_csv: a column `epoch` (fractional within an epoch) or `step`, and any others; cells may be empty.

    Raises:
        ValueError: there is nothing to draw.
    """
    from matplotlib.figure import Figure

    columns = _read_columns(metrics_csv)
    panels: dict[str, dict[str, str]] = defaultdict(dict)
    for column in columns:
        stage, slash, quantity = column.partition("/")
        if slash:
            panels[quantity][stage] = column
    unit = "epoch" if "epoch" in columns else "step"
    if not panels or unit not in columns:
        raise ValueError(f"{metrics_csv} has no curves: a column epoch or step and columns such as train/loss")
    # The loss first, then what is also measured in evaluation, then learning rate and speed.
    order = sorted(panels, key=lambda quantity: (quantity != "loss", panels[quantity].keys() == {"train"}))

    width = math.ceil(math.sqrt(len(order)))
    height = math.ceil(len(order) / width)
    figure = Figure((1 + 4 * width, 0.5 + 3 * height), dpi=120, layout="constrained")
    grid = figure.subplots(height, width, squeeze=False).flat
    for quantity, axes in zip(order, grid, strict=False):
        for stage, column in panels[quantity].items():
            there = np.isfinite(columns[column])
            x, y = columns[unit][there], columns[column][there]
            colour, marker = STAGE_COLOURS.get(stage, GREY), "o" if len(x) <= 40 else None
            axes.plot(x, y, color=colour, marker=marker, markersize=3, label=stage)
        axes.set(title=quantity, xlabel=unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if panels[quantity].keys() != {"train"}:
            axes.legend(frameon=False)
    for axes in grid:
        axes.remove()
    _save(figure, path)


def _read_columns(metrics_csv: str | Path) -> dict[str, np.ndarray]:
    """NaN where a cell is empty."""
    with open(metrics_csv, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {column: np.array([float(row[column] or "nan") for row in rows]) for column in (rows[0] if rows else ())}


def _save(figure: Figure, path: str | Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary)
