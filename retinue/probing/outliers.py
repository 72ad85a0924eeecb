"""Out-of-distribution scores of images by their features and logits; higher scores are more in-distribution.

- `msp`: the maximum of the softmax (Hendrycks and Gimpel 2017, arXiv:1610.02136).
- `energy`: the negative free energy, the log-sum-exp of the logits (Liu et al. 2020, arXiv:2010.03759).
- `vim`: virtual-logit matching (Wang et al. 2022, arXiv:2203.10807).
- `knn`: similarity to the k-th nearest training image (Sun et al. 2022, arXiv:2204.06507).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import logsumexp
from torch import Tensor

from retinue.evaluation.statistics import draw_images, percentile_intervals
from retinue.probing.choice import ROWS
from retinue.probing.features import Features

SCORES = ("msp", "energy", "vim", "knn")
FIGURES = ("auroc", "fpr95")
# Share of the in-distribution images that the threshold of `fpr95` keeps.
KEPT = 0.95


@dataclass(frozen=True)
class OutlierScores:
    """The scores of `SCORES` for images, from the features of the training images and a linear classifier.

    ViM adds a virtual logit: the norm of the features' part outside the principal subspace of the training features,
    scaled so that its mean over the training images is the mean of their largest logit. The origin of the features is
    where all logits are 0. The subspace has as many dimensions as in the authors' code: 1000 for 2048 channels or more,
    512 for 768 or more, else half of the channels.

    Attributes:
        train: Features (N, D) of the training images.
        weight: Weights (D, K) of the classifier, whose logits are features @ weight + bias.
        bias: Biases (K,).
        k: The neighbour whose similarity is the score `knn`.
    """

    train: Features
    weight: Tensor
    bias: Tensor
    k: int

    def __post_init__(self) -> None:
        """Check the number of neighbours.

        Raises:
            ValueError: There are fewer training images.
        """
        if self.k > len(self.train.label):
            raise ValueError(f"probe.k={self.k} is more than the {len(self.train.label)} training images")

    def __call__(self, sets: Iterable[Features]) -> list[dict[str, np.ndarray]]:
        """Return the scores (N,) of the images of each set by name, float64."""
        weight, bias, train = (part.detach().cpu().double() for part in (self.weight, self.bias, self.train.values))
        origin = -torch.linalg.pinv(weight.T) @ bias
        channels = train.shape[1]
        principal = 1000 if channels >= 2048 else 512 if channels >= 768 else channels // 2
        centred = train - origin
        # Eigenvalues ascend, so the first eigenvectors span what is outside the principal subspace.
        outside = torch.linalg.eigh(centred.T @ centred / len(train)).eigenvectors[:, : channels - principal]
        scale = (train @ weight + bias).amax(1).mean() / (centred @ outside).norm(dim=1).mean()
        gallery = F.normalize(self.train.values)
        results = []
        for images in sets:
            values = images.values.cpu().double()
            logits = (values @ weight + bias).numpy()
            energy = logsumexp(logits, axis=1)
            neighbours = [
                (part @ gallery.T).topk(self.k).values[:, -1].cpu()
                for part in F.normalize(images.values.to(gallery.device)).split(ROWS)
            ]
            results.append(
                {
                    "msp": np.exp(logits.max(1) - energy),
                    "energy": energy,
                    "vim": energy - (scale * ((values - origin) @ outside).norm(dim=1)).numpy(),
                    "knn": torch.cat(neighbours).double().numpy(),
                }
            )
        return results


def separation(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float]:
    """Return how well scores separate images, from how often each level of the scores occurs.

    Args:
        inside: (L,), number of in-distribution images at each level, from the lowest score to the highest.
        outside: (L,), the same of the out-of-distribution images.

    Returns:
        AUROC, the probability that an in-distribution image scores higher, where equal scores count half; and FPR95,
        the share of the out-of-distribution images above the highest threshold that keeps 95 % of the others.
    """
    n_inside, n_outside = inside.sum(), outside.sum()
    above_inside, above_outside = (part[::-1].cumsum()[::-1] for part in (inside, outside))
    auroc = outside @ (above_inside - inside / 2) / (n_inside * n_outside)
    level = np.flatnonzero(above_inside >= KEPT * n_inside - 1e-9)[-1]
    return float(auroc), float(above_outside[level] / n_outside)


def outlier_figures(
    inside: dict[str, np.ndarray], outside: dict[str, np.ndarray], *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Return AUROC and FPR95 of each score with 95 % intervals, percentile bootstraps over the images of both sets.

    Args:
        inside: Scores (N,) of the in-distribution images by name.
        outside: Scores (M,) of the out-of-distribution images.
        resamples: Number of resamples.
        seed: Seed of the bootstrap.

    Returns:
        `<score>_auroc`, `<score>_fpr95` and `..._ci95` of each, and `n`, the number of out-of-distribution images.
    """
    levels = {}
    for name in inside:
        _, level = np.unique(np.concatenate([inside[name], outside[name]]), return_inverse=True)
        levels[name] = np.split(level, [len(inside[name])])
    n, m = (len(next(iter(scores.values()))) for scores in (inside, outside))

    def figures(inside_counts: np.ndarray, outside_counts: np.ndarray) -> np.ndarray:
        rows = []
        for own, other in levels.values():
            size = max(own.max(), other.max()) + 1
            rows += separation(np.bincount(own, inside_counts, size), np.bincount(other, outside_counts, size))
        return np.array(rows)

    observed = figures(np.ones(n), np.ones(m))
    draws = zip(draw_images(n, resamples, seed), draw_images(m, resamples, seed + 1), strict=True)
    intervals = percentile_intervals(observed, np.array([figures(*counts) for counts in draws])).tolist()
    names = [f"{score}_{figure}" for score in inside for figure in FIGURES]
    result: dict[str, Any] = {"n": m}
    for name, value, interval in zip(names, observed.tolist(), intervals, strict=True):
        result |= {name: value, f"{name}_ci95": interval}
    return result
