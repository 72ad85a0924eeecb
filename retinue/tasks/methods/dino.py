"""DINO: a net learns from all crops of an image what its momentum teacher says about the two large ones.

Paper: Emerging Properties in Self-Supervised Vision Transformers (Caron et al., ICCV 2021, arXiv:2104.14294). Written
after the paper and checked against https://github.com/facebookresearch/dino (Apache-2.0).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ops.clusters import mean_over_ranks
from retinue.tasks.methods.joint_embedding_losses import self_distillation
from retinue.tasks.methods.method import Method
from retinue.tasks.methods.multi_crop import pooled_views
from retinue.tasks.methods.projectors import PrototypeHead
from retinue.tasks.methods.teacher import cosine, follow, set_teacher_mode, teacher_of


class DINO(Method):
    """Self-distillation with multi-crop. The backbone, which remains, is the teacher's; a copy of it is trained.

    Args:
        backbone: Net from the registry that takes images of any size.
        epochs: Number of epochs of the training.
        global_views: Number of views, the first ones, that the teacher sees.
        prototypes: Number of scores; the paper has 65,536.
        hidden: Number of hidden channels of the heads.
        bottleneck: Number of channels before the prototypes.
        unit_prototypes: Keep the prototypes on the unit sphere.
        student_temperature: Divisor of the student's scores.
        teacher_temperature: Divisors of the teacher's centred scores at the start and after `warmup_epochs`.
        warmup_epochs: Number of epochs in which the teacher's temperature changes linearly.
        freeze_epochs: Number of epochs at the start in which the prototypes stay as they are.
        momentum: Momentum of the teacher at the start, which rises to 1 along half a cosine.
        center_momentum: Momentum of the mean of the teacher's scores.
        final_weight_decay: Weight decay at the end, to which that of the recipe moves along half a cosine. None keeps
            the recipe's.
        arguments: As those of `Method`.
    """

    trained = "student.backbone"
    copies = ("student.backbone",)
    center: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        epochs: int,
        global_views: int,
        prototypes: int,
        hidden: int,
        bottleneck: int,
        unit_prototypes: bool,
        student_temperature: float,
        teacher_temperature: tuple[float, float],
        warmup_epochs: int,
        freeze_epochs: int,
        momentum: float,
        center_momentum: float,
        final_weight_decay: float | None,
        **arguments: Any,
    ):
        super().__init__(teacher_of(backbone), **arguments)
        head = PrototypeHead(
            self.feature_dim, prototypes, hidden=hidden, bottleneck=bottleneck,
            unit_prototypes=unit_prototypes,
        )  # fmt: skip
        self.student = nn.ModuleDict({"backbone": backbone, "head": head})
        self.head = teacher_of(head)
        self.register_buffer("center", torch.zeros(prototypes))
        self.epochs, self.global_views = epochs, global_views
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.warmup_epochs, self.freeze_epochs = warmup_epochs, freeze_epochs
        self.momentum, self.center_momentum = momentum, center_momentum
        self.final_weight_decay = final_weight_decay
        # Mean scores of the teacher in the batches since the last optimiser step
        self._means: list[Tensor] = []

    def train(self, mode: bool = True) -> "DINO":
        super().train(mode)
        for part in (self.backbone, self.head):
            set_teacher_mode(part, mode)
        return self

    def forward(self, batch: dict[str, Any], progress: float) -> dict[str, Tensor]:
        views, count = batch["views"], len(batch["views"][0]["image"])
        with torch.no_grad():
            teacher = self.head(pooled_views(self.backbone, views[: self.global_views])).unflatten(0, (-1, count))
        student = self.student["head"](pooled_views(self.student["backbone"], views)).unflatten(0, (-1, count))
        # Batch norms are also estimated in training mode, without gradients.
        if self.training and torch.is_grad_enabled():
            self._means.append(teacher.float().mean((0, 1)))
        loss = self_distillation(
            student, teacher, self.center,
            student_temperature=self.student_temperature, teacher_temperature=self.temperature_at(progress),
        )  # fmt: skip
        return {"loss": loss}

    def temperature_at(self, progress: float) -> float:
        """Return the teacher's temperature, which is the same throughout an epoch."""
        start, end = self.teacher_temperature
        share = int(progress * self.epochs + 1e-6) / max(1, self.warmup_epochs - 1)
        return start + (end - start) * min(1.0, share) if self.warmup_epochs else end

    def before_step(self, optimizer: Optimizer, progress: float) -> None:
        if progress * self.epochs < self.freeze_epochs:
            head: Any = self.student["head"]
            for parameter in head.prototypes.parameters():
                parameter.grad = None
        if self.final_weight_decay is None:
            return
        for group in optimizer.param_groups:
            start = group.setdefault("start_weight_decay", group["weight_decay"])
            if start:
                group["weight_decay"] = cosine(start, self.final_weight_decay, progress)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        momentum = cosine(self.momentum, 1.0, progress)
        follow(self.backbone, self.student["backbone"], momentum)
        follow(self.head, self.student["head"], momentum)
        mean = mean_over_ranks(torch.stack(self._means).mean(0))
        self.center.lerp_(mean, 1 - self.center_momentum)
        self._means.clear()
