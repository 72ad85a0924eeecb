"""Plots of a detection test: precision-recall curves, average precision by class, detections next to the truth.

matplotlib is imported when a plot is drawn.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retinue.evaluation.detection import IOUS, SIZES, Accuracy, ImageDetections, decode_mask
from retinue.evaluation.plots import BLUE, GREY, LIGHT_BLUE, ORANGE, save_figure
from retinue.utils.arithmetic import ceil_div
from retinue.utils.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Minimum score of a detection that is drawn.
MIN_DRAWN_SCORE = 0.3
COLOURS = {"box": BLUE, "mask": ORANGE}
# Values of recall at which pycocotools evaluates the precision.
RECALL = np.linspace(0, 1, 101)
# Largest number of panels in a plot with one panel for each class.
MAX_PANELS = 100


def plot_precision_recall(path: str | Path, accuracies: Mapping[str, Accuracy]) -> None:
    """Plot precision against recall at IoU 0.5 and 0.75, each class in grey and the mean of the classes in colour.

    Args:
        path: file to write; its suffix determines the format.
        accuracies: results of `evaluate` by kind, `box` or `mask`; each kind is a row of the plot.
    """
    figure, grid = _curve_grid(len(accuracies), 2)
    for row, (kind, accuracy) in zip(grid, accuracies.items(), strict=True):
        has_objects = ~np.isnan(accuracy.class_ap)
        for axes, iou in zip(row, (0.5, 0.75), strict=True):
            # (101, classes with objects)
            curves = _curves(accuracy, iou, "all")[:, has_objects]
            axes.plot(RECALL, curves, color=GREY, alpha=0.3, linewidth=0.8)
            title = f"{kind}, IoU {iou}"
            if has_objects.any():
                axes.plot(RECALL, curves.mean(1), color=COLOURS[kind], linewidth=2.5)
                title += f": AP {curves.mean():.3f}"
            axes.set(title=title)
    save_figure(figure, path)


def plot_precision_by_size(path: str | Path, accuracies: Mapping[str, Accuracy]) -> None:
    """Plot precision against recall at IoU 0.5 and 0.75, the mean of the classes for each size of objects.

    Args:
        path: file to write; its suffix determines the format.
        accuracies: results of `evaluate` by kind, `box` or `mask`; each kind is a row of the plot.
    """
    figure, grid = _curve_grid(len(accuracies), 2)
    for row, (kind, accuracy) in zip(grid, accuracies.items(), strict=True):
        for axes, iou in zip(row, (0.5, 0.75), strict=True):
            for size, colour in zip(SIZES[1:], (LIGHT_BLUE, BLUE, ORANGE), strict=True):
                curves = _curves(accuracy, iou, size)
                curves = curves[:, ~np.isnan(curves[0])]
                if curves.size:
                    axes.plot(RECALL, curves.mean(1), color=colour, label=f"{size}: AP {curves.mean():.3f}")
            axes.set(title=f"{kind}, IoU {iou}")
            if axes.lines:
                axes.legend(frameon=False, fontsize="small")
    save_figure(figure, path)


def plot_precision_by_class(path: str | Path, accuracies: Mapping[str, Accuracy], class_names: Sequence[str]) -> None:
    """Plot precision against recall at IoU 0.5 in a panel for each class that has objects, at most `MAX_PANELS`.

    Args:
        path: file to write; its suffix determines the format.
        accuracies: results of `evaluate` by kind, `box` or `mask`.
        class_names: name of each class, by label.
    """
    first = next(iter(accuracies.values()))
    labels = np.flatnonzero(~np.isnan(first.class_ap))[:MAX_PANELS]
    columns = max(1, min(5, len(labels)))
    figure, grid = _curve_grid(max(1, ceil_div(len(labels), columns)), columns, side=2.4)
    panels = grid.ravel()
    for axes, label in zip(panels, labels, strict=False):
        for kind, accuracy in accuracies.items():
            curve = _curves(accuracy, 0.5, "all")[:, label]
            axes.plot(RECALL, curve, color=COLOURS[kind], label=f"{kind} {curve.mean():.3f}")
        axes.set_title(str(class_names[label]), fontsize="small")
        axes.legend(frameon=False, fontsize="x-small")
    for axes in panels[len(labels) :]:
        axes.remove()
    save_figure(figure, path)


def write_precision_csv(path: str | Path, accuracies: Mapping[str, Accuracy], class_names: Sequence[str]) -> None:
    """Write the precision-recall curves at IoU 0.5 and 0.75 as a CSV table.

    The columns are kind, size, class, iou, and the precision at recall 0.00, 0.01, ..., 1.00; classes without objects
    of a size are left out.

    Args:
        path: file to write.
        accuracies: results of `evaluate` by kind, `box` or `mask`.
        class_names: name of each class, by label.
    """
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "size", "class", "iou", *(f"{recall:.2f}" for recall in RECALL)])
        for kind, accuracy in accuracies.items():
            for size in SIZES:
                for iou in (0.5, 0.75):
                    for name, curve in zip(class_names, _curves(accuracy, iou, size).T, strict=True):
                        if not np.isnan(curve[0]):
                            writer.writerow([kind, size, name, iou, *(f"{precision:.4g}" for precision in curve)])


def _curves(accuracy: Accuracy, iou: float, size: str) -> np.ndarray:
    """Return the precision at `RECALL` of each class, (101, K), at one of `IOUS`, for objects of a size."""
    return accuracy.size_precision[np.argmin(np.abs(IOUS - iou)), :, :, SIZES.index(size)]


def _curve_grid(rows: int, columns: int, side: float = 4.0) -> tuple[Figure, np.ndarray]:
    """Return a figure with a grid of panels (rows, columns) of precision against recall."""
    from matplotlib.figure import Figure

    figure = Figure((1 + side * columns, 0.5 + side * rows), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.ravel():
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.label_outer()
    return figure, grid


def plot_class_ap(path: str | Path, accuracies: Mapping[str, Accuracy], class_names: Sequence[str]) -> None:
    """Plot a bar for the average precision (IoU 0.5 to 0.95) of each class that has objects, the best class at the top.

    Args:
        path: file to write; its suffix determines the format.
        accuracies: results of `evaluate` by kind, `box` or `mask`.
        class_names: name of each class, by label.
    """
    from matplotlib.figure import Figure

    first = next(iter(accuracies.values())).class_ap
    order = [label for label in np.argsort(first) if not np.isnan(first[label])]
    figure = Figure((8, min(100, 1.5 + 0.25 * len(order))), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(accuracies)
    for i, (kind, accuracy) in enumerate(accuracies.items()):
        positions = np.arange(len(order)) + 0.4 - height * (i + 0.5)
        mean = accuracy.figures["ap"]
        label = kind if mean is None else f"{kind}, mean {mean:.3f}"
        axes.barh(positions, accuracy.class_ap[order], height, color=COLOURS[kind], label=label)
    axes.set(xlabel="average precision, IoU 0.5 to 0.95", xlim=(0, 1), ylim=(-0.6, len(order) - 0.4))
    axes.set_yticks(range(len(order)), [str(class_names[label]) for label in order], fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(accuracies), frameon=False)
    save_figure(figure, path)


def plot_detections(
    path: str | Path,
    image: np.ndarray,
    detections: ImageDetections,
    truth: Sequence[Mapping[str, Any]] | None,
    category_ids: Sequence[int],
    class_names: Sequence[str],
) -> None:
    """Draw an image with its detections and, on the right of it, the image with its annotations if there are any.

    Detections with a score below `MIN_DRAWN_SCORE` are left out. Crowds are dashed.

    Args:
        path: file to write; its suffix determines the format.
        image: uint8 (H, W, C), C is 1 or 3.
        detections: detections in the image.
        truth: the image's annotations in COCO's format; None for an image without labels.
        category_ids: id of each class, by label.
        class_names: name of each class, by label.
    """
    from matplotlib.figure import Figure

    height, width = image.shape[:2]
    panels = 1 if truth is None else 2
    figure = Figure((7 * panels, 0.4 + 7 * height / width), dpi=120, layout="constrained")
    left, *right = figure.subplots(1, panels, squeeze=False)[0]
    drawn = np.flatnonzero(detections.scores >= MIN_DRAWN_SCORE)
    left.set_title(f"detections: {len(drawn)} with a score of {MIN_DRAWN_SCORE} or more")
    for axes in (left, *right):
        axes.imshow(np.broadcast_to(image, (height, width, 3)), extent=(0, width, height, 0), interpolation="nearest")
        axes.set_axis_off()
    # The detections with the highest scores are drawn last, on top.
    for i in drawn[::-1]:
        x1, y1, x2, y2 = detections.boxes[i].tolist()
        label = int(detections.labels[i])
        mask = None
        if detections.masks is not None:
            mask = decode_mask({"size": detections.size, "counts": detections.masks[i]}, detections.size)
        draw_object(left, label, f"{class_names[label]} {detections.scores[i]:.2f}", (x1, y1, x2 - x1, y2 - y1), mask)
    labels = {category: label for label, category in enumerate(category_ids)}
    for annotation in truth or ():
        label = labels[annotation["category_id"]]
        mask = decode_mask(annotation["segmentation"], (height, width)) if annotation.get("segmentation") else None
        linestyle = "--" if annotation.get("iscrowd") else "-"
        draw_object(right[0], label, class_names[label], annotation["bbox"], mask, linestyle)
    if truth is not None:
        right[0].set_title(f"truth: {len(truth)}")
    save_figure(figure, path)


def draw_object(
    axes: Axes, label: int, text: str, box: Sequence[float], mask: np.ndarray | None, linestyle: str = "-"
) -> None:
    """Draw a box (x, y, width, height) and a mask (H, W) in the colour of the label."""
    from matplotlib.colors import hsv_to_rgb
    from matplotlib.patches import Rectangle

    # The golden ratio keeps the hues of neighbouring labels far apart.
    colour = tuple(hsv_to_rgb((label * 0.618 % 1, 0.85, 0.75)))
    if mask is not None:
        height, width = mask.shape
        overlay = np.where(mask[..., None], (*colour, 0.45), 0.0)
        axes.imshow(overlay, extent=(0, width, height, 0), interpolation="nearest")
    x, y, width, height = box
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour, linestyle=linestyle, linewidth=1.5))
    # The text stands above the box unless it would be outside the image.
    alignment = "bottom" if y > 0.03 * axes.get_ylim()[0] else "top"
    axes.text(
        x, y, text, fontsize=7, color="white", verticalalignment=alignment, clip_on=True,
        bbox={"facecolor": colour, "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip
