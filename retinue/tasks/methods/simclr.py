"""SimCLR, and AMCL on it: two views of an image attract each other, and views of other images are repelled.

Papers: A Simple Framework for Contrastive Learning of Visual Representations (Chen et al., ICML 2020,
arXiv:2002.05709); Adaptive Multi-head Contrastive Learning (Wang et al., ECCV 2024, arXiv:2310.05615). Written after
the papers and https://github.com/LeiWangR/cl.
"""

from typing import Any

import torch
from torch import Tensor, nn

from retinue.tasks.methods.contrastive_losses import ContrastiveLoss
from retinue.tasks.methods.method import Method
from retinue.tasks.methods.multi_crop import pooled_views
from retinue.tasks.methods.processes import gather, rank
from retinue.tasks.methods.projectors import Projectors


class SimCLR(Method):
    """SimCLR with any number of heads, and AMCL with temperatures of pairs.

    Args:
        backbone: Net from the registry.
        heads: Number of projectors side by side; SimCLR has 1, AMCL 3.
        hidden: Number of hidden channels of a projector.
        dim: Number of channels of a projection.
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
        temperature: float | str,
        limits: tuple[float, float],
        penalty: float,
        **arguments: Any,
    ):
        super().__init__(backbone, **arguments)
        self.projectors = Projectors(heads, (self.feature_dim, hidden, dim), final_norm=True)
        self.loss = ContrastiveLoss(heads, dim, temperature, limits, penalty)

    def forward(self, batch: dict[str, Any], progress: float) -> dict[str, Tensor]:
        features = pooled_views(self.backbone, batch["views"])
        own, count = self.projectors(features), len(features)  # (C, 2 · B, D)
        keys = gather(own.transpose(0, 1)).transpose(0, 1) if self.training else own
        first = rank() * count if self.training else 0
        itself = torch.arange(first, first + count, device=own.device)
        return {"loss": self.loss(own, keys, itself.roll(count // 2), itself)}
