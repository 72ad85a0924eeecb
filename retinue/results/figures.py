"""Names of figures (metrics and costs): which one a task reports, their units, and which direction is better."""

from collections.abc import Sequence

from retinue.results.collection import Run

# Fractions of 1, which tables show in %.
FRACTIONS = (
    "top1",
    "top5",
    "mean_class_accuracy",
    "ece",
    "adaptive_ece",
    "calibrated_ece",
    "calibrated_adaptive_ece",
    "map",
    "f1_micro",
    "f1_macro",
    "code_map",
    "miou",
    "dice",
    "image_iou",
    "box_ap",
    "mask_ap",
    "pq",
)
COUNTS = ("params", "macs")
LOWER_IS_BETTER = (
    "loss",
    "brier",
    "ece",
    "aurc",
    "mce",
    "hd95",
    "params",
    "macs",
    "seconds",
    "memory_mb",
    "peak_mb",
    "ms_per_image",
)


def main_figures(runs: Sequence[Run]) -> list[str]:
    """Return the name of each task's main test metric, such as `test/top1`.

    A run whose config does not name the main metric contributes its first test metric.
    """
    names: dict[str, None] = {}
    for run in runs:
        metrics = [name for name in (run.result or {}).get("metrics", {}) if run.number(name) is not None]
        figure = f"test/{run.settings.get('task.figure')}"
        if figure in metrics:
            names[figure] = None
        else:
            # `test/n` is the number of images, not a metric.
            names |= dict.fromkeys([name for name in metrics if name != "test/n"][:1])
    return list(names)


def display_unit(name: str, largest: float) -> tuple[str, float]:
    """Return the unit in which a figure is shown and its value, such as `("%", 0.01)`.

    Args:
        name: Name of the figure, such as `test/top1`.
        largest: The largest value to be shown; it decides between M and G.
    """
    figure = name.rpartition("/")[2]
    if figure in FRACTIONS or figure.startswith("robust_"):
        return "%", 0.01
    if name in COUNTS:
        return ("G", 1e9) if largest >= 1e9 else ("M", 1e6)
    return "", 1.0


def lower_is_better(name: str) -> bool:
    """Tell whether a smaller value of a figure is the better one, as for losses and costs."""
    return name.endswith(LOWER_IS_BETTER)
