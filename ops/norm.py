"""Norms of ops."""

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """Root mean square norm over the last axis, (..., D) to the same shape, in the type of its input.

    PyTorch's module leaves the fused kernel under autocast, where the weight has another type than the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, list(self.normalized_shape), weight, self.eps)
