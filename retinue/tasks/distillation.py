"""Distillation from a timm teacher (Hinton et al., arXiv:1503.02531; hard labels: DeiT, arXiv:2012.12877)."""

from functools import cached_property

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.factory import check_name
from models.weights import load_weights


class Teacher:
    """A frozen net whose scores a student learns from.

    It is no `nn.Module`, so that it stands in no checkpoint, no optimiser and no average of the student.

    Args:
        teacher: name of a timm model, ours included.
        weights: its checkpoint; null takes timm's pretrained weights.
        mode: `soft` (KL divergence at `temperature`) or `hard` (cross-entropy with its most likely class).
        alpha: its share of the loss.

    Raises:
        ValueError: unknown name or mode; later: there are no weights, or they do not fit.
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
        """The teacher, loaded when training asks for it first: evaluating a student needs none."""
        try:
            net = timm.create_model(self.teacher, pretrained=self.weights is None, num_classes=self.num_classes)
        except RuntimeError as error:  # timm has no weights of that name
            raise ValueError(f"task.distillation.teacher={self.teacher} needs task.distillation.weights") from error
        if self.weights is not None:
            load_weights(net, self.weights)
        return net.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict) -> "Teacher":
        return self  # an average of the student's weights needs no second teacher

    def blend(self, loss: Tensor, logits: Tensor, image: Tensor) -> Tensor:
        """(1 - alpha) * `loss` + alpha * the teacher's, for the student's `logits` (B, K) of `image`."""
        with torch.no_grad():
            scores = self.net.to(image.device)(image)
        if self.mode == "hard":
            taught = F.cross_entropy(logits, scores.argmax(1))
        else:
            student, target = (F.log_softmax(x.float() / self.temperature, -1) for x in (logits, scores))
            taught = F.kl_div(student, target, reduction="batchmean", log_target=True) * self.temperature**2
        return (1 - self.alpha) * loss + self.alpha * taught
