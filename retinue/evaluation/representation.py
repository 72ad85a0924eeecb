"""Effective rank of features."""

import numpy as np


def rankme(features: np.ndarray, eps: float = 1e-7) -> float:
    """Return RankMe, the effective rank of features (N, D), from 1 to min(N, D) (arXiv:2210.02885, equation 1).

    It is the exponential of the entropy of the singular values divided by their sum.
    """
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / values.sum() + eps
    return float(np.exp(-(shares * np.log(shares)).sum()))
