"""Momentum teachers: copies of nets that follow the nets by an exponential moving average."""

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def teacher_of(module: Any) -> Any:
    """Return a copy of a net that takes no gradient."""
    return copy.deepcopy(module).requires_grad_(False)


def set_teacher_mode(module: nn.Module, training: bool) -> None:
    """Let a teacher compute without dropout and drop path; in training its batch norms use the batch's statistics."""
    module.eval()
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.train(training)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters to momentum · own + (1 - momentum) · student's; its buffers are its own."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def cosine(start: float, end: float, progress: float) -> float:
    """Return a value that goes from `start` to `end` along half a cosine, as progress goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
