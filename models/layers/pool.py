"""Global pooling with what some papers compute between it and the classifier."""

from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn


class NormedPool(nn.Module):
    """Global pooling, a LayerNorm and, with `hidden`, a linear layer with tanh: (B, C, H, W) to (B, hidden or C).

    Args:
        kind: Kind of pooling, as in `timm.layers.SelectAdaptivePool2d`.
        dim: Number of channels C.
        eps: Epsilon of the norm.
        hidden: Number of channels of the linear layer, or None for no such layer.
    """

    def __init__(self, kind: str, dim: int, eps: float, hidden: int | None = None):
        super().__init__()
        self.pool = SelectAdaptivePool2d(pool_type=kind, flatten=True)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.hidden = nn.Identity() if hidden is None else nn.Sequential(nn.Linear(dim, hidden), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(self.norm(self.pool(x)))
