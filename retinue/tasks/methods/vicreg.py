"""VICReg: two views of an image have near embeddings, whose channels vary and do not covary.

Paper: VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning (Bardes et al., ICLR 2022,
arXiv:2105.04906). Written after the paper and checked against https://github.com/facebookresearch/vicreg.
"""

from typing import Any

from torch import Tensor, nn

from retinue.tasks.methods.joint_embedding_losses import vicreg
from retinue.tasks.methods.method import Method
from retinue.tasks.methods.processes import gather
from retinue.tasks.methods.projectors import projector


class VICReg(Method):
    """Squared distance between two views, with variance and covariance of the batch's embeddings.

    Args:
        backbone: Net from the registry.
        hidden: Number of hidden channels of the projector.
        dim: Number of channels of an embedding.
        similarity: Weight of the distance between the views.
        variance: Weight of the hinge on the deviations.
        covariance: Weight of the squared covariances.
        arguments: As those of `Method`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        hidden: int,
        dim: int,
        similarity: float,
        variance: float,
        covariance: float,
        **arguments: Any,
    ):
        super().__init__(backbone, **arguments)
        self.projector = projector((self.feature_dim, hidden, hidden, dim))
        self.weights = {"similarity": similarity, "variance": variance, "covariance": covariance}

    def forward(self, batch: dict[str, Any], progress: float) -> dict[str, Tensor]:
        # Each view passes alone, so that batch norms see one kind of view at a time.
        embeddings = [self.projector(self.features(view["image"])) for view in batch["views"]]
        first, second = [gather(z) for z in embeddings] if self.training else embeddings
        return {"loss": vicreg(first, second, **self.weights)}
