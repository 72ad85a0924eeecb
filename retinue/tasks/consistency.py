"""Consistency of the predictions for several views of an image."""

from torch import Tensor

# Smallest probability of the mean prediction, as in the authors' code
SMALLEST = 1e-7


def jensen_shannon(logits: Tensor, views: int) -> Tensor:
    """Return the Jensen-Shannon divergence between the predictions for the views of an image, a scalar.

    AugMix (Hendrycks et al., ICLR 2020, arXiv:1912.02781): the mean over the views of the Kullback-Leibler divergence
    from the mean prediction, and the mean over the images.

    Args:
        logits: (views * B, K), view by view.
        views: Number of views.
    """
    log_p = logits.float().log_softmax(1).unflatten(0, (views, -1))  # (V, B, K)
    p = log_p.exp()
    mean = p.mean(0).clamp(SMALLEST, 1).log()
    return (p * (log_p - mean)).sum(2).mean()
