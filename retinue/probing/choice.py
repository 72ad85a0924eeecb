"""Choice of a probe's hyper-parameters on a part of the training images; the test split takes no part in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from retinue.probing.features import Features

# Function from features (B, ...) to logits (S, B, K), of S settings.
Scores = Callable[[Tensor], Tensor]
Setting = dict[str, Any]
# Number of images whose scores are computed at a time.
ROWS = 1024


class Probe(Protocol):
    """A probe with the settings from which one is chosen."""

    @property
    def settings(self) -> Sequence[Setting]:
        """Values of the hyper-parameters, by name."""
        ...

    def fit(self, train: Features, settings: Sequence[Setting]) -> Scores:
        """Fit the probe with each of the settings."""
        ...


@dataclass(frozen=True)
class Chosen:
    """A fitted probe.

    Attributes:
        setting: The chosen setting.
        trials: Every setting with its `accuracy` on the held-out images; empty if there was only one setting.
        images: Number of the held-out images; 0 if there was only one setting.
        scores: Scores of the probe that was fitted with the chosen setting to all training images.
    """

    setting: Setting
    trials: list[Setting]
    images: int
    scores: Scores


def hold_out(label: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split images into those to fit and those to choose by, with the same share of each class.

    At least one image of each class is held out, except for classes with one image.

    Args:
        label: int64 (N,), class of each image.
        share: Share of the images that is held out.
        seed: Seed of the split.

    Returns:
        Positions of the images to fit, and of the others, both sorted.

    Raises:
        ValueError: No class has two images, so nothing can be held out.
    """
    rng = np.random.default_rng(seed)
    classes = [rng.permutation(np.flatnonzero(label.cpu().numpy() == each)) for each in label.unique().tolist()]
    held_out = [rows[: min(len(rows) - 1, max(1, round(share * len(rows))))] for rows in classes]
    others = [rows[len(out) :] for rows, out in zip(classes, held_out, strict=True)]
    if not sum(map(len, held_out)):
        raise ValueError(f"no class of the {len(label)} training images has two, so none can be held out to choose by")
    fit, choose = (torch.from_numpy(np.sort(np.concatenate(parts))) for parts in (others, held_out))
    return fit.to(label.device), choose.to(label.device)


def choose(probe: Probe, train: Features, share: float, seed: int) -> Chosen:
    """Choose the setting with the highest accuracy on held-out training images, and fit it to all of them.

    Of settings with equal accuracies the first is chosen. With one setting nothing is held out.

    Args:
        probe: The probe.
        train: Features of the training images.
        share: Share of the training images that is held out.
        seed: Seed of the choice of these images.

    Raises:
        ValueError: No image can be held out, or no setting gives finite scores.
    """
    settings = list(probe.settings)
    if len(settings) == 1:
        return Chosen(settings[0], [], 0, probe.fit(train, settings))
    fit_rows, choose_rows = hold_out(train.label, share, seed)
    held_out = train.take(choose_rows)
    scores = predict(probe.fit(train.take(fit_rows), settings), held_out.values)
    # The comparisons that argmax makes with NaN are of no use, so a setting that diverged has the accuracy 0.
    finite = scores.isfinite().flatten(1).all(1)
    accuracy = (scores.argmax(-1) == held_out.label.cpu()).double().mean(1) * finite
    if not finite.any():
        raise ValueError(f"the probe diverges with all of its {len(settings)} settings: lower its learning rates")
    setting = settings[int(accuracy.argmax())]
    trials = [{**each, "accuracy": value} for each, value in zip(settings, accuracy.tolist(), strict=True)]
    return Chosen(setting, trials, len(choose_rows), probe.fit(train, [setting]))


@torch.no_grad()
def predict(scores: Scores, values: Tensor) -> Tensor:
    """Return the scores of all images (S, N, K) on the CPU, which are computed in parts."""
    return torch.cat([scores(part).cpu() for part in values.split(ROWS)], dim=1)


def standardiser(values: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that standardises features (B, D) by the mean and variance of each channel of `values` (N, D).

    This is the batch norm without weights that MAE (arXiv:2111.06377) puts before a linear probe, with the statistics
    of all images.
    """
    mean, scale = values.mean(0), (values.var(0, correction=0) + 1e-6).rsqrt()
    return lambda x: (x - mean) * scale
