"""Distillation from a teacher in timm's registry (Hinton et al., arXiv:1503.02531; hard labels: arXiv:2012.12877)."""

from functools import cached_property

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.factory import check_name
from models.weights import load_weights


class Teacher:
    """A frozen net from whose scores a student learns.

    This class is not an `nn.Module`, so that the teacher is not part of the student's checkpoints, optimiser and
    average of weights.

    Args:
        teacher: Name of a net in timm's registry, which has our nets too.
        weights: Weights file of the teacher; None takes timm's pretrained weights.
        mode: "soft" (KL divergence at `temperature`) or "hard" (cross-entropy with the teacher's most likely class).
        alpha: Share of the teacher's part in the loss, from 0 to 1.
        temperature: Divisor of the logits in mode "soft".
        num_classes: Number of classes.

    Raises:
        ValueError: The name or the mode is unknown. Training raises one when it first uses the teacher, if there are no
            weights or they do not fit.
    """

    def __init__(
        self, *, teacher: str, weights: str | None, mode: str, alpha: float, temperature: float, num_classes: int
    ):
        if mode not in ("soft", "hard"):
            raise ValueError(f"task.distillation.mode must be soft or hard, not {mode!r}")
        check_name(teacher)
        self.teacher, self.weights, self.num_classes = teacher, weights, num_classes
        self.mode, self.alpha, self.temperature = mode, alpha, temperature

    @cached_property
    def net(self) -> nn.Module:
        """The teacher. It is loaded when training first uses it, since the evaluation of a student needs no teacher."""
        try:
            net = timm.create_model(self.teacher, pretrained=self.weights is None, num_classes=self.num_classes)
        except RuntimeError as error:
            # timm has no pretrained weights of that name.
            raise ValueError(f"task.distillation.teacher={self.teacher} needs task.distillation.weights") from error
        if self.weights is not None:
            load_weights(net, self.weights)
        return net.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict) -> "Teacher":
        # The average of the student's weights copies the task; it needs no second teacher.
        return self

    def blend(self, loss: Tensor, logits: Tensor, image: Tensor) -> Tensor:
        """Return (1 - alpha) * loss + alpha * distillation loss, a scalar.

        Args:
            loss: The student's loss on the targets, a scalar.
            logits: The student's logits (B, K).
            image: The images (B, C, H, W), for the teacher.
        """
        with torch.no_grad():
            teacher_logits = self.net.to(image.device)(image)
        if self.mode == "hard":
            distillation_loss = F.cross_entropy(logits, teacher_logits.argmax(1))
        else:
            student = F.log_softmax(logits.float() / self.temperature, -1)
            target = F.log_softmax(teacher_logits.float() / self.temperature, -1)
            # The factor keeps the size of the gradients independent of the temperature.
            distillation_loss = F.kl_div(student, target, reduction="batchmean", log_target=True) * self.temperature**2
        return (1 - self.alpha) * loss + self.alpha * distillation_loss
