"""Base class of SimCLR and MoCo v3: projectors of the features and a contrastive loss, with any number of heads."""

from typing import Any

from torch import nn

from retinue.tasks.methods.contrastive_losses import ContrastiveLoss
from retinue.tasks.methods.method import Method
from retinue.tasks.methods.projectors import Projectors


class Contrastive(Method):
    """Base class of methods in which views of an image attract each other and views of other images repel each other.

    Args:
        backbone: Net from the registry.
        heads: Number of projectors side by side; SimCLR and MoCo v3 have 1, AMCL 3.
        hidden: Number of hidden channels of a projector.
        dim: Number of channels of a projection.
        layers: Number of layers of a projector.
        temperature: Divisor of the similarities; "adaptive" gives each pair its own (AMCL).
        limits: Minimum and maximum of adaptive temperatures.
        penalty: Weight of AMCL's penalty on adaptive temperatures.
        arguments: As those of `Method`.

    Raises:
        ValueError: The temperature or the limits are not as expected.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        heads: int,
        hidden: int,
        dim: int,
        layers: int = 2,
        temperature: float | str,
        limits: tuple[float, float],
        penalty: float,
        **arguments: Any,
    ):
        super().__init__(backbone, **arguments)
        widths = (self.feature_dim, *[hidden] * (layers - 1), dim)
        self.projectors = Projectors(heads, widths, final_norm=True)
        self.loss = ContrastiveLoss(heads, dim, temperature, limits, penalty)
