"""Statistics of feature maps by depth: CKA, principal components, high frequencies, similarity and rank of tokens."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retinue.evaluation.representation import rankme


class MinibatchCKA:
    """Linear CKA between layers, accumulated over batches (Nguyen et al., ICLR 2021, arXiv:2010.15327, equation 3).

    Each batch adds the unbiased estimates of HSIC (Song et al., 2012); their ratio does not depend on the batch size in
    expectation.

    Example:
        >>> cka = MinibatchCKA()
        >>> for images in batches: cka.add(maps_of_one_net(images), maps_of_another(images))
        >>> cka.result()  # (layers of the one, layers of the other)
    """

    def __init__(self) -> None:
        self.cross: Tensor | float = 0.0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def add(self, first: list[Tensor], second: list[Tensor]) -> None:
        """Add the features of a batch of at least four images, each (B, ...), of both nets.

        Raises:
            ValueError: The batch has fewer than four images, for which there is no unbiased estimate.
        """
        kernels = [[_kernel(x) for x in features] for features in (first, second)]
        if len(kernels[0][0]) < 4:
            raise ValueError(f"CKA needs batches of at least 4 images, not {len(kernels[0][0])}")
        self.cross = self.cross + torch.stack([torch.stack([hsic(k, m) for m in kernels[1]]) for k in kernels[0]])
        self.first = self.first + torch.stack([hsic(k, k) for k in kernels[0]])
        self.second = self.second + torch.stack([hsic(k, k) for k in kernels[1]])

    def result(self) -> np.ndarray:
        """Return CKA between the layers of the first and of the second net, (L1, L2)."""
        first, second = torch.as_tensor(self.first), torch.as_tensor(self.second)
        return (self.cross / (first[:, None] * second).sqrt()).cpu().numpy()


def _kernel(x: Tensor) -> Tensor:
    """Return the linear kernel of features (B, ...) with zeros on the diagonal, float64 (B, B)."""
    x = x.flatten(1).double()
    kernel = x @ x.T
    return kernel.fill_diagonal_(0)


def hsic(k: Tensor, m: Tensor) -> Tensor:
    """Return the unbiased estimate of HSIC of two kernels (n, n) with zeros on the diagonal, a scalar."""
    n = len(k)
    one = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))
    return ((k * m).sum() + one) / (n * (n - 3))


def principal_colours(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the first three principal components of all tokens as colours from 0 to 1, and their shares of variance.

    Args:
        features: Maps (B, H, W, C); the components are shared by all images.

    Returns:
        (B, H, W, 3) and (3,). With fewer than three channels or tokens, the colours that are left over are 0.5.
    """
    tokens = features.flatten(0, 2).double().cpu().numpy()
    centred = tokens - tokens.mean(0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    number = min(3, len(values))
    # The sign of a direction is arbitrary: its largest entry is made positive.
    directions = directions[:number]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1)
    scores = centred @ (directions * np.sign(largest)).T
    low, high = np.percentile(scores, [1, 99], axis=0)
    colours = np.full((len(tokens), 3), 0.5)
    colours[:, :number] = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    shares = np.zeros(3)
    shares[:number] = values[:number] ** 2 / max((values**2).sum(), 1e-300)
    return colours.reshape(*features.shape[:3], 3), shares


def high_frequency_share(features: Tensor) -> float:
    """Return the share of the energy of maps (B, H, W, C), without their means, at frequencies above half of Nyquist's.

    The frequency of a component is the larger one of both axes. NaN if a side of the map is shorter than 4 tokens, so
    that both halves have no components, or if the map is constant.
    """
    H, W = features.shape[1:3]
    if min(H, W) < 4:
        return float("nan")
    energy = torch.fft.fft2(features.double(), dim=(1, 2)).abs().square().sum((0, 3))
    rows, columns = (torch.fft.fftfreq(side, device=features.device).abs() for side in (H, W))
    high = torch.maximum(rows[:, None], columns) > 0.25
    energy[0, 0] = 0
    return float(energy[high].sum() / energy.sum()) if energy.sum() > 0 else float("nan")


def relative_amplitude(features: Tensor) -> float:
    """Return the log10 of the amplitude at the highest frequency of both axes relative to that of the map's mean.

    This is the end of the curve in Park and Kim, ICLR 2022 (arXiv:2202.06709, figure 2), for maps (B, H, W, C). NaN if
    a side of the map is 1.
    """
    H, W = features.shape[1:3]
    if min(H, W) < 2:
        return float("nan")
    amplitude = torch.fft.fft2(features.double(), dim=(1, 2)).abs().mean((0, 3))
    return float((amplitude[H // 2, W // 2].clamp_min(1e-300) / amplitude[0, 0].clamp_min(1e-300)).log10())


def token_similarity(features: Tensor) -> float:
    """Return the mean cosine similarity between different tokens of an image, over images (B, H, W, C).

    NaN for maps of one token.
    """
    tokens = F.normalize(features.flatten(1, 2).double(), dim=-1)
    n = tokens.shape[1]
    if n == 1:
        return float("nan")
    # The sum of all pairs is the squared length of the sum of the tokens.
    pairs = tokens.sum(1).square().sum(-1) - tokens.square().sum((1, 2))
    return float((pairs / (n * (n - 1))).mean())


def effective_rank(features: Tensor) -> float:
    """Return the mean effective rank of an image's tokens less their mean, from 1, over images (B, H, W, C).

    It is RankMe's (arXiv:2210.02885): the exponential of the entropy of the singular values. NaN for maps of one token.
    """
    tokens = features.flatten(1, 2)
    if tokens.shape[1] == 1:
        return float("nan")
    centred = (tokens - tokens.mean(1, keepdim=True)).cpu().numpy()
    return float(np.mean([rankme(image) if image.any() else 1.0 for image in centred]))
