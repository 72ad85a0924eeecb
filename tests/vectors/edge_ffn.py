"""Edge-preserving feed-forward network of CFSR (Wu et al., IEEE TIP 2024, arXiv:2401.05633).

Written after the paper and the authors' repository, Aitical/CFSR (no licence).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Horizontal and vertical Sobel filter and Laplacian, rows from top to bottom
FILTERS = (
    ((1, 0, -1), (2, 0, -2), (1, 0, -1)),
    ((1, 2, 1), (0, 0, 0), (-1, -2, -1)),
    ((0, 1, 0), (1, -4, 1), (0, 1, 0)),
)
# In the authors' code one entry of the first and of the last filter stands in the wrong place.
AUTHORS_FILTERS = (
    ((0, 1, -1), (2, 0, -2), (1, 0, -1)),
    FILTERS[1],
    ((1, 0, 0), (1, -4, 1), (0, 1, 0)),
)


class ScaledFilter(nn.Module):
    """Fixed depthwise 3 x 3 filter with a learned factor and bias for each channel.

    Args:
        dim: Number of channels.
        values: The filter.
    """

    mask: Tensor

    def __init__(self, dim: int, values: tuple[tuple[int, ...], ...]):
        super().__init__()
        self.scale = nn.Parameter(1e-3 * torch.randn(dim, 1, 1, 1))
        self.bias = nn.Parameter(1e-3 * torch.randn(dim))
        self.register_buffer("mask", torch.tensor(values, dtype=torch.get_default_dtype()).repeat(dim, 1, 1, 1))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the scaled filter (C, 1, 3, 3) and the biases (C,)."""
        return self.scale * self.mask, self.bias


class EdgeFFN(nn.Module):
    """MLP whose hidden channels add their own 3 x 3 convolution and edges: (B, H, W, C) to the same shape.

    The convolution is the sum of a learned depthwise filter and three fixed ones with learned factors.

    Args:
        dim: Number of channels C.
        ratio: Hidden channels relative to `dim`; default 2.
        masks: "true" (default) or "authors": the fixed filters with the slips of the authors' code.
        merged: Build the form of the authors' released weights, in which one learned filter holds the sum.

    Raises:
        ValueError: `masks` is unknown.
    """

    renames = (
        *((rf"^scale_{name}$", f"filters.{i}.scale") for i, name in enumerate(("sobel_x", "sobel_y", "laplacian"))),
        *((rf"^{name}_bias$", f"filters.{i}.bias") for i, name in enumerate(("sobel_x", "sobel_y", "laplacian"))),
        *((rf"^mask_{name}$", f"filters.{i}.mask") for i, name in enumerate(("sobel_x", "sobel_y", "laplacian"))),
    )

    def __init__(self, dim: int, ratio: int = 2, masks: str = "true", merged: bool = False):
        super().__init__()
        if masks not in ("true", "authors"):
            raise ValueError(f"masks must be 'true' or 'authors', not {masks!r}")
        hidden = ratio * dim
        self.fc1 = nn.Linear(dim, hidden)
        self.pos: Any = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        filters = FILTERS if masks == "true" else AUTHORS_FILTERS
        self.filters = nn.ModuleList(() if merged else (ScaledFilter(hidden, values) for values in filters))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(x))
        weight, bias = self.kernel()
        edges = F.conv2d(hidden.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight))
        return self.fc2(hidden + F.gelu(edges).permute(0, 2, 3, 1))

    def kernel(self) -> tuple[Tensor, Tensor]:
        """Return the sum of all filters (hidden, 1, 3, 3) and of their biases (hidden,)."""
        weight, bias = self.pos.weight, self.pos.bias
        for part in self.filters:
            edges, edge_bias = part()
            weight, bias = weight + edges, bias + edge_bias
        return weight, bias

    @torch.no_grad()
    def merge(self) -> None:
        """Replace the filters by their sum, for inference."""
        weight, bias = self.kernel()
        self.pos.weight.copy_(weight)
        self.pos.bias.copy_(bias)
        self.filters = nn.ModuleList()
