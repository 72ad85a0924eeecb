"""Gaussian adaptive attention, GAAM (Ioannides et al., 2024, arXiv:2401.11143).

Written after the paper and the authors' repository, gioannides/Gaussian-Adaptive-Attention (Apache-2.0), which has the
op without a net.
"""

import torch
from torch import Tensor, nn

from ops.registry import FIRST, Place, register_op

AXES = ("tokens", "channels")


class GaussianHead(nn.Module):
    """Weighting of one part of an axis by a product of Gaussians.

    Args:
        gaussians: Number of Gaussians.
        eps: Added to the variance, and the smallest sum by which the weights are divided.

    Attributes:
        mean_offsets: Offset of each Gaussian from the part's mean.
        c: Width of each Gaussian relative to the part's standard deviation.
    """

    def __init__(self, gaussians: int, eps: float = 1e-8):
        super().__init__()
        self.eps = eps
        self.mean_offsets = nn.Parameter(torch.zeros(gaussians))
        self.c = nn.Parameter(torch.randn(gaussians).exp())

    def forward(self, x: Tensor, axis: int) -> Tensor:
        if x.shape[axis] == 1:
            # One value has no variance, and a weight of 1; the parameters still need a gradient, for DDP.
            return x + 0 * (self.mean_offsets.sum() + self.c.sum()).to(x.dtype)
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(precise, axis, keepdim=True)
        distances = (precise - mean)[..., None] - self.mean_offsets
        # Logarithms of the densities are added, since their product has a wide range.
        exponents = -(distances**2) / (2 * (variance[..., None] + self.eps) * self.c**2)
        weights = (exponents - 0.5 * (2 * torch.pi * self.c**2).log()).sum(-1).exp()
        return (precise * weights / weights.sum(axis, keepdim=True).clamp(min=self.eps)).to(x.dtype)


@register_op("gaussian_adaptive")
class GaussianAdaptiveAttention(nn.Module):
    """Each value is weighted by its distance from the mean over tokens or channels, without any projection.

    The heads split the axis, which is the tokens in row-major order or the channels, into contiguous parts of equal
    length; the last part takes the remainder. In each part the weight of a value is a product of Gaussians around the
    part's mean with learned offsets and widths, divided by the sum of the weights along the part. An axis with fewer
    values than heads uses as many heads as it has values. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        axis: "tokens" (default) or "channels".
        gaussians: Number of Gaussians of each head; default 4.
    """

    family = "channel"

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, axis: str = "tokens", gaussians: int = 4):
        super().__init__()
        if axis not in AXES:
            raise ValueError(f"axis must be 'tokens' or 'channels', not {axis!r}")
        if gaussians < 1:
            raise ValueError(f"gaussians must be at least 1, not {gaussians}")
        self.axis = 1 + AXES.index(axis)
        self.attention_heads = nn.ModuleList(GaussianHead(gaussians) for _ in range(num_heads))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        length = tokens.shape[self.axis]
        heads = self.attention_heads[: min(len(self.attention_heads), length)]
        part = length // len(heads)
        parts = tokens.split([part] * (len(heads) - 1) + [length - part * (len(heads) - 1)], self.axis)
        out = torch.cat([head(t, self.axis) for head, t in zip(heads, parts, strict=True)], self.axis)
        return out.unflatten(1, x.shape[1:3])
