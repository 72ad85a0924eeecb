"""Pictures of a segmentation test: intersection over union by class, maps, and predictions next to the truth.

matplotlib is imported when a plot is drawn. Only its objects are used, so there is no global state and no display.
"""

from __future__ import annotations

import colorsys
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from retinue.evaluation.plots import BLUE, ORANGE, save_figure
from retinue.evaluation.segmentation import PixelCounts, areas, class_iou
from retinue.utils.files import replacing, write_text
from retinue.utils.masks import IGNORED

# Largest number of classes in a legend; the classes with the most pixels are taken.
MAX_IN_LEGEND = 24
# Opacity of the classes' colours over an image.
OPACITY = 0.6


def plot_class_iou(path: str | Path, counts: PixelCounts, class_names: Sequence[str]) -> None:
    """Plot a bar for each class that is true or predicted somewhere, the best class at the top, and the mean."""
    from matplotlib.figure import Figure

    iou = class_iou(areas(counts.confusion))
    # argsort puts NaN last, and these classes are cut off.
    order = np.argsort(-iou)[: np.isfinite(iou).sum()]
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
    save_figure(figure, path)


def draw_prediction(
    path: str | Path, image: np.ndarray, mask: np.ndarray | None, prediction: np.ndarray, class_names: Sequence[str]
) -> None:
    """Draw an image, its true labels and its predicted labels side by side, with a legend of the classes that occur.

    Args:
        path: file to write; its suffix determines the format.
        image: uint8 (H, W, 3), or (H, W, 1) for grey.
        mask: (H, W), true labels; ignored pixels (255) stay uncoloured. None for an image without labels.
        prediction: (H, W), predicted labels.
        class_names: name of each class, by label.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = class_colours(len(class_names))
    height, width = prediction.shape
    panel_width = 5.0
    image = np.broadcast_to(image, (height, width, 3))
    maps = {"prediction": prediction} if mask is None else {"truth": mask, "prediction": prediction}
    panels = {"image": image} | {title: overlay(image, labels, colours) for title, labels in maps.items()}
    size = len(panels) * panel_width, panel_width * height / width + 0.9
    figure = Figure(size, dpi=110, layout="constrained")
    for axes, (title, panel) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(panel)
        axes.set_title(title)
        axes.set_axis_off()
    shown = np.concatenate([labels[labels != IGNORED] for labels in maps.values()])
    pixels = np.bincount(shown, minlength=len(class_names))
    largest = [i for i in np.argsort(-pixels, kind="stable")[:MAX_IN_LEGEND] if pixels[i]]
    patches = [Patch(color=tuple(colours[i] / 255), label=class_names[i]) for i in largest]
    figure.legend(handles=patches, loc="outside lower center", ncols=8, frameon=False, fontsize="small")
    save_figure(figure, path)


def overlay(image: np.ndarray, mask: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Lay the colours of the labels over an image.

    Args:
        image: uint8 (H, W, 3).
        mask: (H, W), labels; pixels with the label 255 stay unchanged.
        colours: uint8 (K, 3), colour of each label.

    Returns:
        uint8 (H, W, 3).
    """
    labelled = mask != IGNORED
    out = image.copy()
    out[labelled] = np.rint((1 - OPACITY) * image[labelled] + OPACITY * colours[mask[labelled]])
    return out


def write_map(path: Path, prediction: np.ndarray, values: np.ndarray) -> None:
    """Write predicted labels as a PNG of one channel, with the colours of the classes as its palette.

    Args:
        path: file to write.
        prediction: (H, W), predicted labels.
        values: uint8 (K,), value of each label in the file.
    """
    palette = np.zeros((256, 3), np.uint8)
    palette[values] = class_colours(len(values))
    image = Image.fromarray(values[prediction])
    image.putpalette(palette.tobytes())
    with replacing(path) as temporary:
        image.save(temporary)


def write_map_classes(path: Path, class_names: Sequence[str], values: np.ndarray) -> None:
    """Write what the values of a map mean, as JSON: a list of {"value", "name", "color": [red, green, blue]}."""
    colours = class_colours(len(values)).tolist()
    rows = zip(values.tolist(), class_names, colours, strict=True)
    meanings = [{"value": value, "name": name, "color": colour} for value, name, colour in rows]
    write_text(path, json.dumps(meanings) + "\n")


def class_colours(num_classes: int) -> np.ndarray:
    """Return a colour for each label, uint8 (K, 3); golden-ratio hues in three brightnesses keep neighbours apart."""
    hues = (0.6 + 0.618034 * np.arange(num_classes)) % 1
    values = 1 - 0.22 * (np.arange(num_classes) % 3)
    colours = [colorsys.hsv_to_rgb(hue, 0.85, value) for hue, value in zip(hues, values, strict=True)]
    return np.rint(255 * np.array(colours)).astype(np.uint8)
