"""Contrastive losses on projections of C heads: NT-Xent (InfoNCE), and AMCL with the temperatures of its pairs.

Papers: SimCLR (Chen et al., ICML 2020, arXiv:2002.05709); MoCo v3 (Chen et al., ICCV 2021, arXiv:2104.02057); AMCL
(Wang et al., ECCV 2024, arXiv:2310.05615), equation 2.1. AMCL is written after the formula, which the authors show in
https://github.com/LeiWangR/cl, and after that code's temperatures and penalty; the code's own loss cannot run.

An anchor is compared with keys: one of them is its positive, and the others are its negatives but for those that are
left out. With several heads, a loss is the sum of the heads' losses, and the mean over the anchors.
"""

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from retinue.tasks.methods.projectors import PairTemperature


def similarities(anchors: Tensor, keys: Tensor) -> Tensor:
    """Return the cosine similarities (C, N, M) of anchors (C, N, D) and keys (C, M, D)."""
    return F.normalize(anchors.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).mT


def nt_xent(
    anchors: Tensor, keys: Tensor, positive: Tensor, left_out: Tensor | None = None, *, temperature: float
) -> Tensor:
    """Compute the cross-entropy of the positive among the keys, whose scores are similarities over a temperature.

    Args:
        anchors: Projections (C, N, D); they need not have unit length.
        keys: Projections (C, M, D).
        positive: int64 (N,), index of each anchor's positive among the keys.
        left_out: int64 (N,), index of a key that is not compared, such as the anchor itself; None compares all keys.
        temperature: Divisor of the similarities.

    Returns:
        A scalar.
    """
    scores = similarities(anchors, keys) / temperature
    if left_out is not None:
        scores = scores.scatter(2, _columns(left_out, scores), -math.inf)
    log_p = scores.log_softmax(2).gather(2, _columns(positive, scores))
    return -log_p.mean((1, 2)).sum()


def amcl(
    anchors: Tensor,
    keys: Tensor,
    positive: Tensor,
    left_out: Tensor | None = None,
    *,
    temperature: Callable[[Tensor, Tensor], Tensor],
    penalty: float,
) -> Tensor:
    """Compute AMCL's loss: similarity to the hardest negative minus that to the positive, over the pairs' temperatures.

    For each head and anchor the loss is n / u - p / t + penalty · (omega(t) - omega(u)). Here p and n are the
    similarities to the positive and to the most similar negative, t and u are the temperatures of these two pairs, and
    omega(t) = D / 2 · log t + 1 / t. With a penalty of 1, this is the negative logarithm of the ratio of two Gaussian
    densities of the anchor: one around the positive with the variance t, one around the negative with the variance u.

    Args:
        anchors: Projections (C, N, D); they need not have unit length.
        keys: Projections (C, M, D).
        positive: int64 (N,), index of each anchor's positive among the keys.
        left_out: int64 (N,), index of a key that is not compared, such as the anchor itself; None compares all keys.
        temperature: Function from projections (C, N, D) and (C, N, D) of N pairs to temperatures (C, N).
        penalty: Weight of omega, the paper's beta.

    Returns:
        A scalar.
    """
    similarity = similarities(anchors, keys)
    own = _columns(positive, similarity)
    others = similarity.detach().scatter(2, own, -math.inf)
    if left_out is not None:
        others = others.scatter(2, _columns(left_out, similarity), -math.inf)
    dim, parts = keys.shape[2], []
    for columns in (own, others.argmax(2, keepdim=True)):
        t = temperature(anchors, keys.gather(1, columns.expand(-1, -1, dim)))
        omega = dim / 2 * t.log() + 1 / t
        parts.append(similarity.gather(2, columns)[..., 0] / t - penalty * omega)
    to_positive, to_hardest = parts
    return (to_hardest - to_positive).mean(1).sum()


class ContrastiveLoss(nn.Module):
    """NT-Xent at a constant temperature, or AMCL's loss with temperatures that it learns.

    Args:
        heads: C, number of heads.
        dim: D, number of channels of a projection.
        temperature: Divisor of the similarities, or "adaptive".
        limits: Minimum and maximum of adaptive temperatures.
        penalty: Weight of AMCL's penalty on adaptive temperatures.

    Raises:
        ValueError: The temperature or the limits are not as expected.
    """

    def __init__(self, heads: int, dim: int, temperature: float | str, limits: Sequence[float], penalty: float):
        super().__init__()
        if temperature != "adaptive" and not (isinstance(temperature, int | float) and temperature > 0):
            raise ValueError(f"method.temperature must be a number above 0 or adaptive, not {temperature!r}")
        if len(limits) != 2 or not 0 < limits[0] < limits[1]:
            raise ValueError(f"method.limits must be two temperatures above 0 in rising order, not {list(limits)}")
        self.temperature = temperature
        self.penalty = penalty
        adaptive = temperature == "adaptive"
        self.pair_temperature = PairTemperature(heads, dim, (limits[0], limits[1])) if adaptive else None

    def forward(self, anchors: Tensor, keys: Tensor, positive: Tensor, left_out: Tensor | None = None) -> Tensor:
        """Compute the loss, a scalar; the arguments are those of `nt_xent`."""
        if self.pair_temperature is None:
            return nt_xent(anchors, keys, positive, left_out, temperature=float(self.temperature))
        return amcl(anchors, keys, positive, left_out, temperature=self.pair_temperature, penalty=self.penalty)


def _columns(index: Tensor, scores: Tensor) -> Tensor:
    """Return the index (N,) of a key as columns (C, N, 1) of scores (C, N, M)."""
    return index.expand(scores.shape[0], -1)[..., None]
