"""Plots of a run: confusion matrix, reliability diagram, learning curves.

matplotlib is imported when a plot is drawn. Only its objects are used, so there is no global state and no display.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retinue.evaluation.classification import (
    CALIBRATION_BINS,
    Predictions,
    calibration_bins,
    calibration_gaps,
    risk_coverage,
)
from retinue.utils.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, which colour-blind readers can tell apart, and a grey.
BLUE, LIGHT_BLUE, ORANGE, GREEN, GREY = "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#999999"
STAGE_COLOURS = {"train": BLUE, "val": ORANGE, "test": GREEN}
# Largest numbers of classes for which a confusion matrix shows numbers and class names.
MAX_NUMBERED, MAX_NAMED = 20, 60


def plot_confusion(path: str | Path, predictions: Predictions, class_names: Sequence[str]) -> None:
    """Plot the confusion matrix of a classification test."""
    k = len(class_names)
    pairs = np.bincount(predictions.label * k + predictions.topk[:, 0], minlength=k * k).reshape(k, k)
    draw_confusion(path, pairs, class_names, "images")


def draw_confusion(path: str | Path, pairs: np.ndarray, class_names: Sequence[str], unit: str) -> None:
    """Plot a confusion matrix; each row shows the shares of a true class that were predicted as each class.

    The counts are written beside the plot, as a CSV table with a row for each true class.

    Args:
        path: file to write; its suffix determines the format.
        pairs: (K, K), at [t, p] the number of items of class t that were predicted as p.
        class_names: name of each class, by label.
        unit: name of the items that were counted, in the plural.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    table = Path(path).with_suffix(".csv")
    with replacing(table) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true class", *class_names])
        writer.writerows([name, *row] for name, row in zip(class_names, pairs.tolist(), strict=True))

    k = len(class_names)
    shares = pairs / np.maximum(pairs.sum(1, keepdims=True), 1)

    side = 4 + 0.4 * min(k, MAX_NUMBERED) if k <= MAX_NUMBERED else 12
    figure = Figure((side + 1, side), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    # Single pixels, as in a matrix of many classes, stand out from a dark background.
    cmap = "Blues" if k <= MAX_NAMED else "viridis"
    # The square root makes small shares visible, and most confusions of a good net are small shares.
    image = axes.imshow(shares, cmap=cmap, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    figure.colorbar(image, ax=axes, aspect=40, label=f"share of the class's {unit}")
    axes.set(xlabel="predicted class", ylabel="true class", title=f"Confusion matrix, {pairs.sum():,} {unit}")
    if k <= MAX_NAMED:
        size = 9 if k <= MAX_NUMBERED else 6
        rotate = max(map(len, class_names)) > 2
        axes.set_xticks(
            range(k), class_names, fontsize=size, rotation=45 if rotate else 0, ha="right" if rotate else "center"
        )
        axes.set_yticks(range(k), class_names, fontsize=size)
    if k <= MAX_NUMBERED:
        for i, j in zip(*np.nonzero(pairs), strict=True):
            colour = "white" if shares[i, j] > 0.4 else "black"
            axes.text(j, i, f"{shares[i, j]:.2f}", ha="center", va="center", fontsize=8, color=colour)
    save_figure(figure, path)


def plot_reliability(path: str | Path, predictions: Predictions) -> None:
    """Plot accuracy against confidence for each bin (Guo et al. 2017), above a histogram of the confidences."""
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
    means = {"accuracy": (predictions.correct.mean(), BLUE), "confidence": (predictions.confidence.mean(), ORANGE)}
    for name, (mean, colour) in means.items():
        bottom.axvline(float(mean), color=colour, label=f"mean {name} {mean:.3f}")
    bottom.legend(frameon=False, fontsize="small")
    bottom.set(xlabel="confidence", ylabel="share of images", xlim=(0, 1))
    save_figure(figure, path)


def plot_risk_coverage(path: str | Path, curves: Mapping[str, Predictions]) -> None:
    """Plot the share of wrong answers against the share of answered images (Geifman et al. 2019), in % of the images.

    Args:
        path: file to write; its suffix determines the format.
        curves: predictions by the label of their curve.
    """
    from matplotlib.figure import Figure

    figure = Figure((5, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for (name, predictions), colour in zip(curves.items(), (BLUE, ORANGE, GREEN), strict=False):
        risk = risk_coverage(predictions.confidence, predictions.correct)
        coverage = np.arange(1, len(risk) + 1) / len(risk)
        axes.plot(100 * coverage, 100 * risk, color=colour, label=f"{name}, area {risk.mean():.4f}")
    axes.set(xlabel="coverage: answered images, the most confident first (%)", ylabel="risk: wrong answers (%)")
    axes.set(xlim=(0, 100), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    save_figure(figure, path)


def draw_probabilities(
    path: str | Path, image: np.ndarray, class_names: Sequence[str], probabilities: np.ndarray
) -> None:
    """Draw an image beside a bar for each of its most probable classes.

    Args:
        path: file to write; its suffix determines the format.
        image: uint8 (H, W, 3).
        class_names: names of k classes, the most probable one first.
        probabilities: (k,), probability of each.
    """
    from matplotlib.figure import Figure

    figure = Figure((9, 4), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(image)
    left.set_axis_off()
    # Several classes may have one name, so the bars stand at numbers.
    places = range(len(class_names))
    right.barh(places, probabilities, color=BLUE)
    right.set_yticks(places, class_names)
    right.invert_yaxis()
    right.set(xlabel="probability", xlim=(0, 1))
    right.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def plot_curves(path: str | Path, metrics_csv: str | Path) -> None:
    """Plot the learning curves of a run, with one panel per quantity for all of its stages.

    Args:
        path: file to write; its suffix determines the format.
        metrics_csv: table with a column `epoch` (fractional within an epoch) or `step`, and columns
            `<stage>/<quantity>` such as train/loss; cells may be empty.

    Raises:
        ValueError: if the table has no curves.
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
    # The loss comes first, then quantities that evaluation measures too, then quantities of training alone.
    order = sorted(panels, key=lambda quantity: (quantity != "loss", panels[quantity].keys() == {"train"}))

    width = math.ceil(math.sqrt(len(order)))
    height = math.ceil(len(order) / width)
    figure = Figure((1 + 4 * width, 0.5 + 3 * height), dpi=120, layout="constrained")
    grid = figure.subplots(height, width, squeeze=False).flat
    for quantity, axes in zip(order, grid, strict=False):
        for stage, column in panels[quantity].items():
            finite = np.isfinite(columns[column])
            x, y = columns[unit][finite], columns[column][finite]
            colour, marker = STAGE_COLOURS.get(stage, GREY), "o" if len(x) <= 40 else None
            axes.plot(x, y, color=colour, marker=marker, markersize=3, label=stage)
        axes.set(title=quantity, xlabel=unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if panels[quantity].keys() != {"train"}:
            axes.legend(frameon=False)
    # The iterator `grid` still holds the panels that no quantity uses.
    for axes in grid:
        axes.remove()
    save_figure(figure, path)


def _read_columns(metrics_csv: str | Path) -> dict[str, np.ndarray]:
    """Read the columns of a table; empty cells become NaN."""
    with open(metrics_csv, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return {}
    cells = {column: [row[column] for row in rows] for column in rows[0]}
    return {column: np.array([float(text) if text else math.nan for text in texts]) for column, texts in cells.items()}


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure, completely or not at all; the suffix of `path` determines the format."""
    with replacing(path) as temporary:
        figure.savefig(temporary)
