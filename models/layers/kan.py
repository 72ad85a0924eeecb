"""Layers of Kolmogorov-Arnold networks (Liu et al., ICLR 2025, arXiv:2404.19756)."""

import torch
from torch import Tensor, nn


class KANLayer(nn.Module):
    """Layer of a Kolmogorov-Arnold network: a learned function of each input channel for each output channel.

    The functions are sums of bumps 1 - tanh(·)² at fixed places (FasterKAN, an approximation of splines). Maps (N, C)
    to (N, dim).

    Args:
        in_dim: Input channels C.
        dim: Output channels.
        bumps: Number of bumps, at equal distances from -2 to 2.
        width: Width of a bump.
    """

    grid: Tensor

    def __init__(self, in_dim: int, dim: int, bumps: int = 8, width: float = 0.33):
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(in_dim)
        self.linear = nn.Linear(in_dim * bumps, dim, bias=False)
        self.register_buffer("grid", torch.linspace(-2, 2, bumps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        bumps = 1 - ((self.norm(x).unsqueeze(-1) - self.grid) / self.width).tanh().square()
        return self.linear(bumps.flatten(1).to(x.dtype))
