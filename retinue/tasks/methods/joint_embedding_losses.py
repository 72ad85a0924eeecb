"""Losses on the embeddings of several views of an image without negatives: DINO, LeJEPA and VICReg.

Papers: DINO (Caron et al., ICCV 2021, arXiv:2104.14294, https://github.com/facebookresearch/dino); LeJEPA (Balestriero
and LeCun, 2025, arXiv:2511.08544, https://github.com/rbalestr-lab/lejepa); VICReg (Bardes et al., ICLR 2022,
arXiv:2105.04906, https://github.com/facebookresearch/vicreg). Written after the papers and checked against the code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.clusters import mean_over_ranks
from retinue.tasks.methods.processes import ranks

# SIGReg compares characteristic functions at this number of points from 0 to the largest frequency.
KNOTS, MAX_FREQUENCY = 17, 3.0
# VICReg adds this to a variance before the square root.
VARIANCE_FLOOR = 1e-4


def self_distillation(
    student: Tensor, teacher: Tensor, center: Tensor, *, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Compute DINO's loss: the mean cross-entropy of the teacher's and the student's distributions over two views.

    The pairs of the same view are left out. No gradient reaches the teacher.

    Args:
        student: Scores (V, B, K) of V views of B images; the first views are those of the teacher.
        teacher: Scores (G, B, K) of G global views.
        center: (K,), which is subtracted from the teacher's scores.
        student_temperature: Divisor of the student's scores.
        teacher_temperature: Divisor of the teacher's centred scores.

    Returns:
        A scalar.
    """
    targets = ((teacher.detach().float() - center) / teacher_temperature).softmax(-1)
    log_p = (student.float() / student_temperature).log_softmax(-1)
    entropies = -torch.einsum("gbk,vbk->gv", targets, log_p) / student.shape[1]
    other_view = 1 - torch.eye(*entropies.shape, device=entropies.device)
    return (entropies * other_view).sum() / other_view.sum()


def sigreg(embeddings: Tensor, directions: Tensor, *, over_processes: bool) -> Tensor:
    """Compute SIGReg: how far the embeddings are from a standard normal distribution, along random directions.

    Along each direction this is the statistic of Epps and Pulley (1983), N · ∫ |c(t) - exp(-t²/2)|² exp(-t²/2) dt,
    where c is the characteristic function of the N values, by the trapezoidal rule from -3 to 3.

    Args:
        embeddings: (..., N, D), N rows of this process.
        directions: Unit vectors (D, S), the same on all processes.
        over_processes: Take the rows of all processes, which all call this with the same shape.

    Returns:
        A scalar, the mean over the directions and the leading dimensions.
    """
    t = torch.linspace(0, MAX_FREQUENCY, KNOTS, device=embeddings.device)
    normal = (-t.square() / 2).exp()
    # Both functions have the same modulus at t and -t, so inner points count twice.
    step = MAX_FREQUENCY / (KNOTS - 1)
    weights = normal * torch.where((t == 0) | (t == MAX_FREQUENCY), step, 2 * step)
    phases = (embeddings.float() @ directions)[..., None] * t  # (..., N, S, knots)
    # One tensor for both parts, so that the processes exchange their means once.
    means, rows = torch.stack([phases.cos().mean(-3), phases.sin().mean(-3)]), embeddings.shape[-2]
    if over_processes:
        means, rows = mean_over_ranks(means), rows * ranks()
    distance = (means[0] - normal).square() + means[1].square()
    return rows * (distance @ weights).mean()


def unit_directions(dim: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Return random unit vectors (dim, count) that depend on the seed alone, on a device."""
    directions = torch.randn(dim, count, generator=torch.Generator().manual_seed(seed))
    return F.normalize(directions, dim=0).to(device)


def invariance(embeddings: Tensor, centers: Tensor) -> Tensor:
    """Compute LeJEPA's prediction loss: the mean squared distance of views from their image's mean global view.

    Args:
        embeddings: (V, B, D), V views of B images.
        centers: (B, D), mean of the embeddings of an image's global views.
    """
    return (embeddings - centers).float().square().mean()


def vicreg(first: Tensor, second: Tensor, *, similarity: float, variance: float, covariance: float) -> Tensor:
    """Compute VICReg's loss of two views: squared distance, hinge on the deviations, and squared covariances.

    Args:
        first: Embeddings (B, D) of one view, of the images of all processes.
        second: Embeddings (B, D) of the other view.
        similarity: Weight of the mean squared distance between the views; the paper has 25.
        variance: Weight of the mean of max(0, 1 - deviation) over the channels and views; the paper has 25.
        covariance: Weight of the sum over the views of the squared covariances between channels, over D; the paper
            has 1.

    Returns:
        A scalar.
    """
    loss = similarity * F.mse_loss(first.float(), second.float())
    for view in (first.float(), second.float()):
        centred = view - view.mean(0)
        deviation = (centred.var(0) + VARIANCE_FLOOR).sqrt()
        products = (centred.T @ centred / (len(view) - 1)).square()
        loss = loss + variance * F.relu(1 - deviation).mean() / 2
        loss = loss + covariance * (products.sum() - products.diagonal().sum()) / view.shape[1]
    return loss
