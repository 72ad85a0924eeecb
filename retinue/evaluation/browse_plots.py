"""Pictures of the batches that a net receives, and a plot of a recipe's schedule.

matplotlib is imported when a plot is drawn. Only its objects are used, so there is no global state and no display.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retinue.evaluation.detection_plots import draw_object
from retinue.evaluation.plots import BLUE, save_figure
from retinue.utils.arithmetic import ceil_div

# Height of a view and smallest width of a picture in inches, and largest number of letters of a view's caption.
VIEW_HEIGHT, MIN_WIDTH, CAPTION_LETTERS = 2.0, 5.5, 30


@dataclass(frozen=True)
class View:
    """One image of a batch.

    Attributes:
        image: uint8 (H, W, 3).
        caption: what stands above it.
        boxes: float (N, 4), x1, y1, x2 and y2 of each object.
        labels: int (N,), class of each object.
        masks: (N, h, w), mask of each object, or None.
    """

    image: np.ndarray
    caption: str = ""
    boxes: np.ndarray | None = None
    labels: np.ndarray | None = None
    masks: np.ndarray | None = None


def draw_views(path: Path, title: str, views: Sequence[View], class_names: Sequence[str]) -> None:
    """Draw the images of a batch in a grid, with the boxes and masks of their objects.

    Args:
        path: file to write; its suffix determines the format.
        title: what stands above the grid.
        views: the images.
        class_names: name of each class, by label.
    """
    from matplotlib.figure import Figure

    # Wide images stand in fewer columns.
    aspect = views[0].image.shape[0] / views[0].image.shape[1]
    columns = min(len(views), math.ceil(math.sqrt(len(views) * aspect)))
    rows = ceil_div(len(views), columns)
    size = max(MIN_WIDTH, columns * VIEW_HEIGHT / aspect), 0.5 + rows * (VIEW_HEIGHT + 0.2)
    figure = Figure(size, dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, view in zip(grid, views, strict=False):
        height, width = view.image.shape[:2]
        axes.imshow(view.image, extent=(0, width, height, 0), interpolation="nearest")
        short = view.caption if len(view.caption) <= CAPTION_LETTERS else f"{view.caption[: CAPTION_LETTERS - 1]}…"
        axes.set_title(short, fontsize=7, pad=2)
        if view.boxes is not None and view.labels is not None:
            for i, (box, label) in enumerate(zip(view.boxes.tolist(), view.labels.tolist(), strict=True)):
                x1, y1, x2, y2 = box
                mask = None if view.masks is None else view.masks[i]
                draw_object(axes, label, str(class_names[label]), (x1, y1, x2 - x1, y2 - y1), mask)
    for axes in grid:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def plot_schedule(path: Path, epochs: np.ndarray, settings: Mapping[str, np.ndarray]) -> None:
    """Plot settings of an optimiser over the training, one below the other.

    Args:
        path: file to write; its suffix determines the format.
        epochs: (T,), moments of the training in epochs.
        settings: values (T,) by their name, such as the learning rate.
    """
    from matplotlib.figure import Figure

    figure = Figure((7, 0.5 + 2.6 * len(settings)), dpi=110, layout="constrained")
    panels = figure.subplots(len(settings), 1, squeeze=False, sharex=True).ravel()
    for axes, (name, values) in zip(panels, settings.items(), strict=True):
        axes.plot(epochs, values, color=BLUE)
        title = f"{name}: {values[0]:.3g} to {values[-1]:.3g}, largest {values.max():.3g}"
        axes.set(ylabel=name, ylim=(0, None), title=title)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("epoch")
    save_figure(figure, path)
