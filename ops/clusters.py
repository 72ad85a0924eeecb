"""Clusters of tokens: spherical k-means, and centroids that follow the tokens of the training batches.

Spherical k-means assigns each unit vector to the centroid with which its scalar product is largest, and replaces a
centroid by the normalised sum of its members. Roy et al. (TACL 2021, arXiv:2003.05997) and Liu et al. (CVPR 2025,
arXiv:2503.06896) route and group tokens by it.
"""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F
from torch import Tensor, nn

from retinue.utils.arithmetic import ceil_div

START_STEPS = 10


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum a tensor over all processes of the run; the gradient is summed over them too."""
    return differentiable.all_reduce(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


def mean_over_ranks(x: Tensor) -> Tensor:
    """Average a tensor over all processes of the run."""
    return sum_over_ranks(x) / (dist.get_world_size() if dist.is_initialized() else 1)


def nearest_centroids(tokens: Tensor, means: Tensor) -> Tensor:
    """Return the index of the centroid with the largest scalar product with each token: (B, ..., N).

    Args:
        tokens: Tokens (B, ..., N, D).
        means: Centroids (..., K, D).
    """
    return (tokens @ means.transpose(-2, -1)).argmax(-1)


def spherical_step(tokens: Tensor, means: Tensor) -> Tensor:
    """Return the centroids after one step of spherical k-means over the tokens of all images and all processes.

    A centroid without members is kept. The gradient reaches the tokens, but not through the choice of the members.

    Args:
        tokens: Unit vectors (B, ..., N, D).
        means: Centroids (..., K, D).
    """
    nearest = nearest_centroids(tokens, means)
    members = (nearest.unsqueeze(-1) == torch.arange(means.shape[-2], device=means.device)).to(tokens.dtype)
    sums = sum_over_ranks((members.transpose(-2, -1) @ tokens).sum(0))
    counts = sum_over_ranks(members.sum((0, -2)))
    return torch.where(counts.unsqueeze(-1) > 0, F.normalize(sums, dim=-1), means)


class Centroids(nn.Module):
    """Centroids that are no parameters: an exponential moving average of those of the training batches.

    They are buffers, so checkpoints hold them, and all processes of a run compute the same ones.

    Args:
        shape: Shape (..., K, D) of the centroids: K for each index of the leading dimensions, such as a head's.
        decay: Weight of the old average in the new one.
    """

    means: Tensor
    initted: Tensor

    def __init__(self, *shape: int, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        # The authors' names
        self.register_buffer("means", torch.randn(shape))
        self.register_buffer("initted", torch.tensor(False))
        self.known_to_have_started = False

    def have_started(self) -> bool:
        """Tell whether the centroids have been set; on the meta device, they count as set."""
        if self.initted.is_meta:
            return True
        # Reading the buffer waits for the device, so it is not read again once it is true
        self.known_to_have_started = self.known_to_have_started or bool(self.initted)
        return self.known_to_have_started

    @torch.no_grad()
    def start(self, tokens: Tensor) -> None:
        """Set the centroids by k-means that starts from random tokens, unless they have been set before.

        Args:
            tokens: Unit vectors (B, ..., N, D); each process has equally many.
        """
        if self.have_started():
            return
        flat = tokens.movedim(0, -3).flatten(-3, -2)  # (..., B * N, D)
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        K, N = self.means.shape[-2], tokens.shape[-2]
        chosen = torch.randperm(ranks * flat.shape[-2], device=flat.device)
        chosen = chosen.repeat(ceil_div(K, len(chosen)))[:K]
        if ranks > 1:
            dist.broadcast(chosen, 0)
        # The samplers deal the images to the processes in turn, and each process contributes the tokens that it holds
        image = chosen // N
        place = image // ranks * N + chosen % N
        means = sum_over_ranks(flat.index_select(-2, place) * (image % ranks == rank).unsqueeze(-1))
        for _ in range(START_STEPS):
            means = spherical_step(tokens, means)
        self.means.copy_(means)
        self.initted.fill_(True)

    def follow(self, means: Tensor, after: Tensor) -> None:
        """Average `means` into the centroids when the backward pass has computed the gradient of `after`.

        Waiting for the gradient keeps the centroids as they are while gradient checkpointing repeats a forward pass.
        The first means are taken as they are if `start` has not set the centroids.
        """
        if after.requires_grad:
            after.register_hook(lambda _: self.average(means.detach()))

    @torch.no_grad()
    def average(self, means: Tensor) -> None:
        """Average `means` into the centroids."""
        weight = torch.where(self.initted, 1 - self.decay, 1.0).to(self.means.dtype)
        self.means.lerp_(means.to(self.means.dtype), weight)
        self.initted.fill_(True)
