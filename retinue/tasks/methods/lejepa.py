"""LeJEPA: the views of an image are embedded near their mean, and all embeddings are normally distributed.

Paper: LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics (Balestriero and LeCun, 2025,
arXiv:2511.08544). Written after the paper and checked against https://github.com/rbalestr-lab/lejepa.
"""

from typing import Any

from torch import Tensor, nn

from retinue.tasks.methods.joint_embedding_losses import invariance, sigreg, unit_directions
from retinue.tasks.methods.method import Method
from retinue.tasks.methods.multi_crop import pooled_views
from retinue.tasks.methods.projectors import projector

# Steps of a training are told apart by their progress in this unit.
TICKS = 2**40


class LeJEPA(Method):
    """Prediction of the mean global view, and SIGReg; there is no teacher.

    Args:
        backbone: Net from the registry that takes images of any size.
        global_views: Number of views, the first ones, whose mean the others predict.
        hidden: Number of hidden channels of the projector.
        dim: Number of channels of an embedding.
        directions: Number of random directions in a step.
        weight: Share of SIGReg in the loss, the paper's lambda.
        arguments: As those of `Method`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        global_views: int,
        hidden: int,
        dim: int,
        directions: int,
        weight: float,
        **arguments: Any,
    ):
        super().__init__(backbone, **arguments)
        self.projector = projector((self.feature_dim, hidden, hidden, dim))
        self.global_views, self.dim, self.directions, self.weight = global_views, dim, directions, weight

    def forward(self, batch: dict[str, Any], progress: float) -> dict[str, Tensor]:
        views = batch["views"]
        embeddings = self.projector(pooled_views(self.backbone, views)).unflatten(0, (len(views), -1))
        directions = unit_directions(self.dim, self.directions, round(progress * TICKS), embeddings.device)
        normality = sigreg(embeddings, directions, over_processes=self.training)
        distance = invariance(embeddings, embeddings[: self.global_views].mean(0))
        loss = self.weight * normality + (1 - self.weight) * distance
        return {"loss": loss, "sigreg": normality, "invariance": distance}
