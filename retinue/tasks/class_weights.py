"""Weights of the classes in a classifier's loss."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from retinue.utils.suggestions import nearest

# Value of `recipe.class_weights` that takes the weights from the training images.
BALANCED = "balanced"


def check_class_weights(weights: str | Mapping, class_names: Sequence[str]) -> None:
    """Check that `recipe.class_weights` names classes of the data.

    Raises:
        ValueError: It names another class.
    """
    if isinstance(weights, Mapping):
        for name in map(str, weights):
            if name not in class_names:
                raise ValueError(f"recipe.class_weights: no class is called {name!r}.{nearest(name, class_names)}")


def class_weights(weights: str | Mapping, class_names: Sequence[str], labels: np.ndarray) -> Tensor:
    """Return the weight of each class, float32 (K,).

    Balanced weights are n / (K' n_c) for a class with n_c of the n training images, where K' classes have images; so
    all classes weigh the same in sum, and the mean weight of the images is 1. A class without images has the weight 1.

    Args:
        weights: "balanced", or weights by the class's name; other classes have the weight 1.
        class_names: Name of each class, by label.
        labels: (n,), labels of the training images.
    """
    if isinstance(weights, Mapping):
        by_name = {str(name): weight for name, weight in weights.items()}
        return torch.tensor([by_name.get(name, 1.0) for name in class_names], dtype=torch.float32)
    counts = np.bincount(labels, minlength=len(class_names))
    present = counts > 0
    balanced = np.divide(len(labels), present.sum() * counts, out=np.ones(len(counts)), where=present)
    return torch.tensor(balanced, dtype=torch.float32)


def weighted_mean(losses: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over the images of the loss times the weight of the image's class.

    The sum is divided by the number of images, not by the sum of the weights, so that the parts of a batch on several
    devices have the batch's mean. A mixed image has the mean weight of its classes.

    Args:
        losses: Loss of each image, (B,).
        target: Labels (B,) or soft targets (B, K).
        weights: Weight of each class, (K,).
    """
    of_images = weights[target] if target.ndim == 1 else target.to(weights.dtype) @ weights
    return (losses * of_images).mean()
