"""Temperature scaling: divide a classifier's logits by one number, so that its confidences become calibrated.

Paper: On Calibration of Modern Neural Networks (Guo et al., ICML 2017, arXiv:1706.04599), section 4.2. The temperature
minimises the cross-entropy of a validation split. The most probable class of an image stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from scipy.optimize import brentq

from retinue.evaluation.classification import Predictions, summarize

if TYPE_CHECKING:
    from torch import Tensor

# Range of the temperature.
LOWEST, HIGHEST = 0.01, 100.0
# Figures that depend on the temperature.
FIGURES = ("loss", "brier", "ece", "adaptive_ece", "aurc")


def loss_slope(logits: Tensor, label: Tensor, inverse: float) -> float:
    """Return the derivative of the summed cross-entropy with respect to the inverse temperature.

    Args:
        logits: (N, K), float64.
        label: (N,), 0 to K - 1.
        inverse: The inverse temperature.
    """
    expected = ((logits * inverse).softmax(1) * logits).sum(1)
    return float((expected - logits.gather(1, label[:, None])[:, 0]).sum())


def find_temperature(slope: Callable[[float], float]) -> float:
    """Return the temperature of the smallest cross-entropy, between `LOWEST` and `HIGHEST`.

    The cross-entropy is convex in the inverse temperature, so its slope has one root. If it has none in the range, the
    result is the better end: `LOWEST` if all images are right, for example.

    Args:
        slope: Function from the inverse temperature to the derivative of the cross-entropy, as `loss_slope` computes it
            for the images of one process, and their sum over the processes.
    """
    if slope(1 / LOWEST) <= 0:
        return LOWEST
    if slope(1 / HIGHEST) >= 0:
        return HIGHEST
    root: Any = brentq(lambda log: slope(math.exp(log)), -math.log(HIGHEST), -math.log(LOWEST), xtol=1e-8)
    return math.exp(-root)


def calibrated_figures(calibrated: Predictions, class_names: Sequence[str], temperature: float) -> dict[str, Any]:
    """Return `temperature`, and the `FIGURES` of a test after temperature scaling with the prefix `calibrated_`.

    Args:
        calibrated: Predictions for all images from logits that have been divided by the temperature.
        class_names: Name of each class, by label.
        temperature: The temperature.
    """
    summary = summarize(calibrated, class_names)
    names = [name for figure in FIGURES for name in (figure, f"{figure}_ci95") if name in summary]
    return {"temperature": temperature} | {f"calibrated_{name}": summary[name] for name in names}
