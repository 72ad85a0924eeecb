"""MoCo v3, and AMCL on it: a view attracts the other view of its image as a momentum teacher sees that view.

Papers: An Empirical Study of Training Self-Supervised Vision Transformers (Chen et al., ICCV 2021, arXiv:2104.02057);
Adaptive Multi-head Contrastive Learning (Wang et al., ECCV 2024, arXiv:2310.05615). Written after the papers and
checked against https://github.com/facebookresearch/moco-v3.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.masking import find_stem
from retinue.tasks.methods.contrastive import Contrastive
from retinue.tasks.methods.multi_crop import pooled
from retinue.tasks.methods.processes import gather, rank
from retinue.tasks.methods.projectors import Projectors
from retinue.tasks.methods.teacher import cosine, follow, set_teacher_mode, teacher_of


class MoCo(Contrastive):
    """MoCo v3 with any number of heads, and AMCL with temperatures of pairs.

    The backbone is the one that is trained. The teacher of backbone and projectors follows it with a momentum that
    rises to 1 along half a cosine.

    Args:
        backbone: Net from the registry.
        heads: Number of projectors and predictors side by side.
        hidden: Number of hidden channels of projectors and predictors.
        dim: Number of channels of a projection.
        temperature: As in `Contrastive`.
        momentum: Momentum of the teacher at the start.
        freeze_stem: Leave the patch embedding as it is initialised, which the paper finds to be more stable for ViTs.
        arguments: Further arguments of `Contrastive`; the paper has 3 `layers` for ViTs and 2 for ResNets.

    Raises:
        ValueError: The temperature or the limits are not as expected, or the net has no patch embedding to freeze.
    """

    copies = ("teacher.backbone",)

    def __init__(
        self,
        backbone: nn.Module,
        *,
        heads: int,
        hidden: int,
        dim: int,
        temperature: float | str,
        momentum: float,
        freeze_stem: bool,
        **arguments: Any,
    ):
        super().__init__(backbone, heads=heads, hidden=hidden, dim=dim, temperature=temperature, **arguments)
        if freeze_stem:
            find_stem(backbone).requires_grad_(False)
        self.predictors = Projectors(heads, (dim, hidden, dim), final_norm=True)
        self.teacher = nn.ModuleDict({"backbone": teacher_of(backbone), "projectors": teacher_of(self.projectors)})
        # The paper scales a loss at a constant temperature so that the size of the gradients does not depend on it.
        self.scale = 1.0 if isinstance(temperature, str) else 2 * temperature
        self.momentum = momentum

    def train(self, mode: bool = True) -> "MoCo":
        super().train(mode)
        set_teacher_mode(self.teacher, mode)
        return self

    def forward(self, batch: dict[str, Any], progress: float) -> dict[str, Tensor]:
        first, second = (view["image"] for view in batch["views"])
        positive = torch.arange(len(first), device=first.device) + (rank() * len(first) if self.training else 0)
        # Each view passes alone, so that batch norms see one kind of view at a time.
        queries = [self.predictors(self.projectors(self.features(view))) for view in (first, second)]
        losses = [
            self.loss(query, self.keys(view), positive) for query, view in zip(queries, (second, first), strict=True)
        ]
        return {"loss": self.scale * torch.stack(losses).sum()}

    @torch.no_grad()
    def keys(self, image: Tensor) -> Tensor:
        """Return the teacher's projections (C, N, D) of the images; in training those of all processes."""
        keys = self.teacher["projectors"](pooled(self.teacher["backbone"], image))
        return gather(keys.transpose(0, 1)).transpose(0, 1) if self.training else keys

    def after_step(self, progress: float) -> None:
        for name, part in self.teacher.items():
            follow(part, getattr(self, name), cosine(self.momentum, 1.0, progress))
