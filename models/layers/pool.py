"""Global pooling: generalised means, and what some papers compute between the pooling and the classifier."""

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


class GeM(nn.Module):
    """Generalised-mean pooling: the power mean of the values that are not negative, mean(x^p)^(1/p).

    Fine-tuning CNN Image Retrieval with No Human Annotation (Radenovic et al., 2018, arXiv:1711.02512); MultiGrain
    (arXiv:1902.05509) trains with p = 3.

    Args:
        average: Average pooling that stands for the mean, of any layout.
        p: Exponent; 1 is the average, and large ones approach the maximum.
    """

    def __init__(self, average: nn.Module, p: float = 3.0):
        super().__init__()
        self.average, self.p = average, p

    def forward(self, x: Tensor) -> Tensor:
        # Powers of half-precision numbers would underflow. Negative values count as 0, as in the authors' code.
        return self.average(x.float().clamp(min=1e-6).pow(self.p)).pow(1 / self.p).to(x.dtype)


def insert_gem(net: nn.Module) -> None:
    """Replace a net's global average pooling by GeM, in place.

    Raises:
        ValueError: The net has no layer of global average pooling.
    """
    parents = [m for m in net.modules() if isinstance(getattr(m, "global_pool", None), SelectAdaptivePool2d)]
    if not parents:
        raise ValueError(f"global_pool=gem: {type(net).__name__} has no layer of global average pooling")
    for parent in parents:
        parent.global_pool = GeM(parent.get_submodule("global_pool"))
