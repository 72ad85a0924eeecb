"""Few-shot classification of features by least squares (Kolesnikov et al. 2020, arXiv:1912.11370; big_vision)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.images import draw_shots as draw_class_shots
from retinue.probing.features import Features

# Value of the constant feature that stands for the bias: so large that the regularisation hardly reduces the bias.
BIAS = 100.0


def draw_shots(label: Tensor, shots: int, seed: int) -> Tensor:
    """Draw the same number of images of each class that has images.

    The order of a class's images follows from the seed alone, so fewer shots are a part of more shots.

    Args:
        label: int64 (N,), class of each image.
        shots: Number of images of each class.
        seed: Seed of the draw.

    Returns:
        int64 (classes * shots,), positions of the images.

    Raises:
        ValueError: A class has fewer images.
    """
    labels = label.cpu().numpy()
    fewest = int(np.unique(labels, return_counts=True)[1].min())
    if shots > fewest:
        raise ValueError(f"probe.shots={shots} is more than the {fewest} training images of the smallest class")
    drawn = draw_class_shots(labels, np.ones(len(labels), bool), shots, seed)
    return torch.from_numpy(np.flatnonzero(drawn)).to(label.device)


def least_squares(train: Features, num_classes: int, l2: float, values: Tensor) -> Tensor:
    """Fit a linear regression to the targets 1 for the label and -1 for other classes, and return its scores.

    Features are standardised by the mean and the deviation of `train`. The sum of the squared errors is regularised by
    `l2` times the squared norm of the weights, whose closed form is solved in float64.

    Args:
        train: Features (N, D) to fit.
        num_classes: Number of classes K.
        l2: Strength of the regularisation.
        values: Features (B, D) to classify.

    Returns:
        (B, K), on the device of `train`.
    """
    device = torch.device("cpu") if train.values.device.type == "mps" else train.values.device
    x, test = (each.to(device, torch.float64) for each in (train.values, values))
    mean, std = x.mean(0), x.std(0, correction=0) + 1e-5
    x, test = (F.pad((each - mean) / std, (0, 1), value=BIAS) for each in (x, test))
    target = 2.0 * F.one_hot(train.label.to(device), num_classes).to(x) - 1.0
    identity = torch.eye(min(x.shape), dtype=x.dtype, device=device)
    if x.shape[0] >= x.shape[1]:
        weight = torch.linalg.solve(x.T @ x + l2 * identity, x.T @ target)
    else:
        # The same solution by a system of N equations, of which there are fewer than channels.
        weight = x.T @ torch.linalg.solve(x @ x.T + l2 * identity, target)
    return test @ weight
