"""Losses of semantic segmentation on logits per pixel: cross-entropy, focal, Dice, Tversky and boundary.

Papers: Focal Loss for Dense Object Detection (Lin et al., ICCV 2017, arXiv:1708.02002); V-Net (Milletari et al., 3DV
2016, arXiv:1606.04797) for Dice; Tversky loss function for image segmentation using 3D fully convolutional deep
networks (Salehi et al., MLMI 2017, arXiv:1706.05721); Boundary loss for highly unbalanced segmentation (Kervadec et
al., MIDL 2019, arXiv:1812.07032). Written after the papers' formulas, for K classes by softmax.

Each loss takes logits (B, K, H, W), a mask (B, H, W) of classes 0 to K - 1 or 255, and class weights (K,), and returns
a scalar. Pixels of 255 do not count anywhere. Cross-entropy and focal are means over the pixels, weighted by their
class; the losses of regions are means over the classes that occur in the batch, weighted by class. The mean over
nothing is 0.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retinue.utils.masks import IGNORED, distances_from
from retinue.utils.suggestions import nearest


def cross_entropy(logits: Tensor, mask: Tensor, class_weights: Tensor) -> Tensor:
    """Compute the mean of -log p over the pixels, where p is the probability of the pixel's class."""
    return focal(logits, mask, class_weights, gamma=0.0)


def focal(logits: Tensor, mask: Tensor, class_weights: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Compute the mean of -(1 - p)^gamma log p over the pixels, where p is the probability of the pixel's class."""
    counted = mask != IGNORED
    labels = mask.where(counted, 0)
    log_p = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    # The derivative of a power below 1 is infinite at 0, so a probability that rounds to 1 gets no gradient.
    others = (-log_p.expm1()).clamp(min=_tiny(logits))
    weights = class_weights[labels] * counted
    return -(weights * others**gamma * log_p).sum() / weights.sum().clamp(min=_tiny(logits))


def dice(logits: Tensor, mask: Tensor, class_weights: Tensor) -> Tensor:
    """Compute 1 - Dice, the mean over the classes; Dice is 2 TP / (2 TP + FP + FN), as in `tversky`."""
    return tversky(logits, mask, class_weights, alpha=0.5, beta=0.5)


def tversky(logits: Tensor, mask: Tensor, class_weights: Tensor, *, alpha: float = 0.3, beta: float = 0.7) -> Tensor:
    """Compute 1 - TP / (TP + alpha FP + beta FN), the mean over the classes that occur in the batch.

    TP, FP and FN of a class are sums of probabilities over the pixels of the whole batch: of the class where it is
    true, of the class where it is not true, and of the other classes where it is true.
    """
    p, truth = _regions(logits, mask)
    positives, predicted, true = ((part.sum((0, 2, 3))) for part in (p * truth, p, truth))
    weighted = positives + alpha * (predicted - positives) + beta * (true - positives)
    return _mean_of_classes(1 - positives / weighted.clamp(min=_tiny(logits)), true, class_weights)


def boundary(logits: Tensor, mask: Tensor, class_weights: Tensor) -> Tensor:
    """Compute the mean of p · distance over the pixels, then over the classes that occur in the batch.

    p is the probability of a class and `signed_distances` its distance in pixels. The loss is negative where the
    prediction is right, and it is made for a small weight beside the loss of a region.
    """
    p, truth = _regions(logits, mask)
    distances = torch.from_numpy(signed_distances(mask.cpu().numpy(), logits.shape[1])).to(p)
    pixels = (mask != IGNORED).sum().clamp(min=1)
    return _mean_of_classes((p * distances).sum((0, 2, 3)) / pixels, truth.sum((0, 2, 3)), class_weights)


def signed_distances(mask: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the distance of each pixel from the boundary of each class, in pixels.

    Outside the class, it is the distance from the nearest pixel of the class. Inside, it is 1 minus the distance from
    the nearest pixel of another class. It is 0 in an image without pixels of the class or without pixels of other
    classes. Ignored pixels belong to no class.

    Args:
        mask: (B, H, W), classes 0 to K - 1 or 255.
        num_classes: K.

    Returns:
        float32 (B, K, H, W).
    """
    distances = np.zeros((len(mask), num_classes, *mask.shape[1:]), np.float32)
    for labels, image in zip(mask, distances, strict=True):
        classes = np.unique(labels[labels != IGNORED])
        # A class without others in the image has no boundary.
        for label in classes if len(classes) > 1 else ():
            inside = labels == label
            outside = ~inside & (labels != IGNORED)
            image[label] = np.where(inside, 1 - distances_from(outside), distances_from(inside))
    return distances


def _regions(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities of the classes, 0 at ignored pixels, and where each class is true: (B, K, H, W)."""
    truth = mask[:, None] == torch.arange(logits.shape[1], device=mask.device)[:, None, None]
    return logits.softmax(1) * (mask != IGNORED)[:, None], truth


def _mean_of_classes(losses: Tensor, pixels: Tensor, class_weights: Tensor) -> Tensor:
    """Return the weighted mean of the classes' losses (K,) over the classes with true pixels."""
    weights = class_weights * (pixels > 0)
    return (losses * weights).sum() / weights.sum().clamp(min=_tiny(losses))


def _tiny(x: Tensor) -> float:
    """Smallest divisor: it keeps 0 / 0 at 0, and the gradient finite."""
    return torch.finfo(x.dtype).tiny


LOSSES = {
    "cross_entropy": cross_entropy, "focal": focal, "dice": dice, "tversky": tversky, "boundary": boundary,
}  # fmt: skip


class PixelLoss(nn.Module):
    """Weighted loss of `LOSSES` as a module, with the call of mmsegmentation's losses.

    Args:
        name: Key of `LOSSES`.
        weight: Factor of the loss.
        class_weights: (K,), weight of each class.
        parameters: Parameters of the loss.
    """

    class_weights: Tensor

    def __init__(self, name: str, weight: float, class_weights: Tensor, **parameters: float):
        super().__init__()
        # mmsegmentation logs the loss under this name.
        self.loss_name = f"loss_{name}"
        self.loss, self.weight, self.parameters_of_loss = LOSSES[name], weight, parameters
        # Not saved: a checkpoint has the same weights with any losses.
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, logits: Tensor, mask: Tensor, **_: Any) -> Tensor:
        """Compute the loss of logits (B, K, H, W) for a mask (B, H, W); further arguments change nothing."""
        return self.weight * self.loss(logits.float(), mask, self.class_weights, **self.parameters_of_loss)


def create_losses(
    losses: Mapping[str, Any], class_weights: Sequence[float] | None, num_classes: int, factor: float = 1.0
) -> list[PixelLoss]:
    """Create the losses of `task.losses`.

    Args:
        losses: By name, the weight, or a mapping of parameters and `weight` (1 by default).
        class_weights: `task.class_weights`, one weight of 0 or more for each class. None weights all equally.
        num_classes: K.
        factor: Factor of all weights, such as that of an auxiliary head.

    Raises:
        ValueError: A loss, a parameter or the number of class weights is wrong.
    """
    weights = [1.0] * num_classes if class_weights is None else list(class_weights)
    if len(weights) != num_classes or not max(weights) > 0:
        raise ValueError(f"task.class_weights must be {num_classes} numbers, one above 0 at least, not {weights}")
    created = []
    for name, value in losses.items():
        if name not in LOSSES:
            raise ValueError(f"task.losses has {name!r}.{nearest(name, LOSSES)} There are: {', '.join(LOSSES)}")
        parameters = dict(value) if isinstance(value, Mapping) else {"weight": value}
        known = ["weight", *inspect.getfullargspec(LOSSES[name]).kwonlyargs]
        for key, number in parameters.items():
            if key not in known:
                raise ValueError(f"task.losses.{name} takes {', '.join(known)}, not {key!r}.{nearest(key, known)}")
            if isinstance(number, bool) or not isinstance(number, int | float) or number < 0:
                raise ValueError(f"task.losses.{name}.{key} must be a number, 0 or more, not {number!r}")
        weight = factor * parameters.pop("weight", 1.0)
        created.append(PixelLoss(name, weight, torch.tensor(weights, dtype=torch.float32), **parameters))
    return created
