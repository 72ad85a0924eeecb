"""Plots of a detection test: precision-recall curves, average precision by class, detections next to the truth.

matplotlib is imported when a plot is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retinue.evaluation.detection import IOUS, Accuracy, ImageDetections, decode_mask
from retinue.evaluation.plots import BLUE, GREY, ORANGE, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Minimum score of a detection that is drawn.
MIN_DRAWN_SCORE = 0.3
COLOURS = {"box": BLUE, "mask": ORANGE}


def plot_precision_recall(path: str | Path, accuracies: Mapping[str, Accuracy]) -> None:
    """Plot precision against recall at IoU 0.5 and 0.75, each class in grey and the mean of the classes in colour.

    Args:
        path: file to write; its suffix determines the format.
        accuracies: results of `evaluate` by kind, `box` or `mask`; each kind is a row of the plot.
    """
    from matplotlib.figure import Figure

    figure = Figure((9, 0.5 + 4 * len(accuracies)), dpi=120, layout="constrained")
    grid = figure.subplots(len(accuracies), 2, squeeze=False, sharex=True, sharey=True)
    recall = np.linspace(0, 1, 101)
    for row, (kind, accuracy) in zip(grid, accuracies.items(), strict=True):
        has_objects = ~np.isnan(accuracy.class_ap)
        for axes, iou in zip(row, (0.5, 0.75), strict=True):
            # (101, classes with objects)
            curves = accuracy.precision[np.argmin(np.abs(IOUS - iou))][:, has_objects]
            axes.plot(recall, curves, color=GREY, alpha=0.3, linewidth=0.8)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            title = f"{kind}, IoU {iou}"
            if has_objects.any():
                axes.plot(recall, curves.mean(1), color=COLOURS[kind], linewidth=2.5)
                title += f": AP {curves.mean():.3f}"
            axes.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
            axes.label_outer()
    save_figure(figure, path)


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
    truth: Sequence[Mapping[str, Any]],
    category_ids: Sequence[int],
    class_names: Sequence[str],
) -> None:
    """Draw an image twice: on the left with its detections, on the right with its annotations.

    Detections with a score below `MIN_DRAWN_SCORE` are left out. Crowds are dashed.

    Args:
        path: file to write; its suffix determines the format.
        image: uint8 (H, W, C), C is 1 or 3.
        detections: detections in the image.
        truth: the image's annotations in COCO's format.
        category_ids: id of each class, by label.
        class_names: name of each class, by label.
    """
    from matplotlib.figure import Figure

    height, width = image.shape[:2]
    figure = Figure((14, 0.4 + 7 * height / width), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = np.flatnonzero(detections.scores >= MIN_DRAWN_SCORE)
    left.set_title(f"detections: {len(drawn)} with a score of {MIN_DRAWN_SCORE} or more")
    right.set_title(f"truth: {len(truth)}")
    for axes in (left, right):
        axes.imshow(np.broadcast_to(image, (height, width, 3)), extent=(0, width, height, 0), interpolation="nearest")
        axes.set_axis_off()
    # The detections with the highest scores are drawn last, on top.
    for i in drawn[::-1]:
        x1, y1, x2, y2 = detections.boxes[i].tolist()
        label = int(detections.labels[i])
        mask = None
        if detections.masks is not None:
            mask = decode_mask({"size": detections.size, "counts": detections.masks[i]}, detections.size)
        _draw(left, label, f"{class_names[label]} {detections.scores[i]:.2f}", (x1, y1, x2 - x1, y2 - y1), mask)
    labels = {category: label for label, category in enumerate(category_ids)}
    for annotation in truth:
        label = labels[annotation["category_id"]]
        mask = decode_mask(annotation["segmentation"], (height, width)) if annotation.get("segmentation") else None
        linestyle = "--" if annotation.get("iscrowd") else "-"
        _draw(right, label, class_names[label], annotation["bbox"], mask, linestyle)
    save_figure(figure, path)


def _draw(
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
