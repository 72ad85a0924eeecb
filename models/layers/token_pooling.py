"""Token-aware average pooling, TAP (Guo et al., ICCV 2023, arXiv:2303.11126): each token chooses how far it pools."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenAwarePooling(nn.Module):
    """Replace each token by a mean over its neighbours, at distances that two convolutions choose for the token.

    Candidate 0 is the token itself. Candidate i is the mean of 3 x 3 tokens at a distance of i, where tokens beyond the
    edge of the map are zeros that count. A softmax over the candidates weights them.

    Args:
        dim: Channels C.
        scales: Number of candidates.
    """

    renames = ((r"^proj\.", "weights."),)

    def __init__(self, dim: int, scales: int):
        super().__init__()
        self.weights = nn.Sequential(
            nn.Conv2d(dim, scales, 3, padding=1, bias=False),
            nn.BatchNorm2d(scales),
            nn.Conv2d(scales, scales, 3, padding=1, bias=False),
        )
        self.scales = scales

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        weights = self.weights(x).softmax(1).split(1, dim=1)
        candidates = [x, *(self.mean(x, distance) for distance in range(1, self.scales))]
        return torch.stack([weight * t for weight, t in zip(weights, candidates, strict=True)]).sum(0)

    @staticmethod
    def mean(x: Tensor, distance: int) -> Tensor:
        """Return the mean of the 3 x 3 tokens at a distance around each token of (B, C, H, W)."""
        kernel = x.new_full((x.shape[1], 1, 3, 3), 1 / 9)
        return F.conv2d(x, kernel, padding=distance, dilation=distance, groups=x.shape[1])
