"""Gaussian adaptive attention over channels, GAAM (Ioannides et al., 2024, arXiv:2401.11143).

Written after the paper and the authors' repository, gioannides/Gaussian-Adaptive-Attention (Apache-2.0). The mixer
`gaussian_adaptive` has the form over tokens too.
"""

from torch import Tensor, nn

from ops.attention.gaussian_adaptive import GaussianAdaptiveAttention
from ops.gate_registry import register_gate


@register_gate("gaussian_adaptive")
class GaussianAdaptiveGate(nn.Module):
    """Each value receives itself times a weight that follows from its distance from the mean of its channels' group.

    The weights of the values of a place in one group of channels sum to 1: they are products of Gaussians with learned
    offsets and widths.

    Args:
        dim: Number of channels.
        heads: Number of groups of channels; default 4.
        gaussians: Number of Gaussians of each group; default 4.
    """

    at = "block"

    def __init__(self, dim: int, heads: int = 4, gaussians: int = 4):
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads must be at least 1, not {heads}")
        self.attention = GaussianAdaptiveAttention(dim, min(heads, dim), axis="channels", gaussians=gaussians)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
