"""Quality of features without fine-tuning: nearest neighbours, a linear probe, and the effective rank."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Images of which the similarities to the bank are computed at once.
CHUNK = 1024


def knn_top1(bank: Tensor, labels: Tensor, features: Tensor, neighbours: int = 20, temperature: float = 0.07) -> Tensor:
    """Return the class that the nearest neighbours in a bank vote for, int64 (N,).

    A neighbour's vote is exp(cosine similarity / temperature) (Wu et al., CVPR 2018, arXiv:1805.01978).

    Args:
        bank: Features (M, D) of images whose class is known.
        labels: Their labels, int64 (M,).
        features: Features (N, D).
        neighbours: Number of neighbours, at most M of which are there.
        temperature: Temperature of the votes.
    """
    bank, k = F.normalize(bank.float(), dim=1), min(neighbours, len(bank))
    votes = []
    for chunk in F.normalize(features.float(), dim=1).split(CHUNK):
        similarity, nearest = (chunk @ bank.T).topk(k)
        weights = torch.zeros(len(chunk), int(labels.max()) + 1, device=bank.device)
        # Subtracting the largest similarity changes no order and prevents an overflow.
        weights.scatter_add_(1, labels[nearest], ((similarity - similarity[:, :1]) / temperature).exp())
        votes.append(weights.argmax(1))
    return torch.cat(votes)


def probe_top1(bank: Tensor, labels: Tensor, features: Tensor, decay: float = 1e-3, steps: int = 100) -> Tensor:
    """Return the class that a linear probe predicts, int64 (N,).

    The probe is a multinomial logistic regression on the bank's features, each scaled to mean 0 and deviation 1. The
    loss is convex and L-BFGS starts from 0, so the probe follows from the features alone.

    Args:
        bank: Features (M, D) of images whose class is known.
        labels: Their labels, int64 (M,).
        features: Features (N, D).
        decay: Factor of half the sum of squared weights that is added to the mean loss.
        steps: Maximum number of steps of L-BFGS.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Copies, since tensors of inference mode take no part in a backward pass.
        bank, labels, features = bank.float().clone(), labels.clone(), features.float().clone()
        mean, std = bank.mean(0), bank.std(0, correction=0).clamp_min(1e-6)
        bank, features = (bank - mean) / std, (features - mean) / std
        probe = nn.Linear(bank.shape[1], int(labels.max()) + 1, device=bank.device)
        nn.init.zeros_(probe.weight)
        nn.init.zeros_(probe.bias)
        optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(probe(bank), labels) + decay / 2 * probe.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
        return probe(features).argmax(1).detach()


def rankme(features: np.ndarray, eps: float = 1e-7) -> float:
    """Return RankMe, the effective rank of features (N, D), from 1 to min(N, D) (arXiv:2210.02885, equation 1).

    It is the exponential of the entropy of the singular values divided by their sum.
    """
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / values.sum() + eps
    return float(np.exp(-(shares * np.log(shares)).sum()))
