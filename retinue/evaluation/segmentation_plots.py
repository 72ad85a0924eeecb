"""Pictures of a segmentor's test: IoU of the classes, predictions beside the truth.

matplotlib is imported when something is drawn, and used through its objects alone, without a global state or display.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retinue.evaluation.plots import BLUE, ORANGE
from retinue.evaluation.segmentation import PixelCounts, areas, class_iou
from retinue.utils.files import replacing
from retinue.utils.masks import IGNORED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_IN_LEGEND = 24  # classes of one picture, the largest
OPACITY = 0.6  # of classes over their image


def plot_class_iou(path: str | Path, counts: PixelCounts, class_names: Sequence[str]) -> None:
    """A bar for each class that is in the truth or predicted, the best at the top, and their mean."""
    from matplotlib.figure import Figure

    iou = class_iou(areas(counts.confusion))
    order = np.argsort(-iou)[: np.isfinite(iou).sum()]  # NaN comes last
    figure = Figure((8, 1.2 + 0.2 * len(order)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.barh([class_names[i] for i in order], iou[order], color=BLUE)
    mean = iou[order].mean()
    axes.axvline(mean, color=ORANGE, label=f"mean {mean:.4f}")
    axes.set(xlabel="intersection over union", xlim=(0, 1), title=f"{len(counts.areas):,} images")
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", frameon=False)
    _save(figure, path)


def draw_prediction(
    path: str | Path, image: np.ndarray, mask: np.ndarray, prediction: np.ndarray, class_names: Sequence[str]
) -> None:
    """The image, the truth over it and the prediction over it, with a legend of the classes that occur.

    Args:
        image: uint8 (H, W, 3), or (H, W, 1) for grey.
        mask: (H, W); what is ignored stays uncoloured.
        prediction: (H, W).
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = class_colours(len(class_names))
    H, W = mask.shape
    width = 5.0
    figure = Figure((3 * width, width * H / W + 0.9), dpi=110, layout="constrained")
    image = np.broadcast_to(image, (H, W, 3))
    panels = {"image": image, "truth": overlay(image, mask, colours), "prediction": overlay(image, prediction, colours)}
    for axes, (title, panel) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        axes.imshow(panel)
        axes.set_title(title)
        axes.set_axis_off()
    pixels = np.bincount(mask[mask != IGNORED], minlength=len(class_names)) + np.bincount(
        prediction.ravel(), minlength=len(class_names)
    )
    largest = [i for i in np.argsort(-pixels, kind="stable")[:MOST_IN_LEGEND] if pixels[i]]
    patches = [Patch(color=tuple(colours[i] / 255), label=class_names[i]) for i in largest]
    figure.legend(handles=patches, loc="outside lower center", ncols=8, frameon=False, fontsize="small")
    _save(figure, path)


def overlay(image: np.ndarray, mask: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3): `image` under the colours of its classes; what is ignored stays as it is."""
    seen = mask != IGNORED
    out = image.copy()
    out[seen] = np.rint((1 - OPACITY) * image[seen] + OPACITY * colours[mask[seen]])
    return out


def class_colours(num_classes: int) -> np.ndarray:
    """uint8 (K, 3): hues a golden section apart, in three brightnesses, so that neighbours differ."""
    hues = (0.6 + 0.618034 * np.arange(num_classes)) % 1
    values = 1 - 0.22 * (np.arange(num_classes) % 3)
    colours = [colorsys.hsv_to_rgb(hue, 0.85, value) for hue, value in zip(hues, values, strict=True)]
    return np.rint(255 * np.array(colours)).astype(np.uint8)


def _save(figure: Figure, path: str | Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary)
