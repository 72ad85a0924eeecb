"""Squeeze-and-excitation (Hu et al., CVPR 2018, arXiv:1709.01507)."""

from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Weight the channels of (B, C, ...) by factors that two linear layers compute from the channels' means.

    Args:
        dim: Number of channels C.
        hidden: Number of channels between the two layers.
        bias: Give the layers biases.
        gate: Class of the function from the layers' output to the factors.
    """

    def __init__(self, dim: int, hidden: int, bias: bool = False, gate: type[nn.Module] = nn.Sigmoid):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(dim, hidden, bias), nn.ReLU(), nn.Linear(hidden, dim, bias), gate())

    def forward(self, x: Tensor) -> Tensor:
        factors = self.fc(x.flatten(2).mean(2))
        return x * factors.view(*factors.shape, *[1] * (x.ndim - 2))
