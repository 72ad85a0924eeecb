"""Arithmetic in at least float32, for the parts of an op that half precision is too coarse for."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context in which autocast is off for the device of `x`."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def at_least_float32(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors in float32, or unchanged where they are in float64."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
