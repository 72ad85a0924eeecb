"""How far a formulation may err: its error is compared with that of plain PyTorch in the same type."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Images of a batch that are checked: a mistake that mixes images shows with two.
CHECKED_IMAGES = 2
# Largest error relative to that of plain PyTorch: ours must be as exact; peers that round scores are less exact.
MAX_OWN_ERROR, MAX_PEER_ERROR = 2, 4


def relative_errors(
    computed: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], min_scale: float = 0.0
) -> list[float]:
    """Return the error of each computed tensor relative to the error of plain PyTorch in the same type.

    An error is the root mean square of the difference from `exact`. The error of plain PyTorch may be 0, so half a
    rounding step of the tensor's largest absolute value is added to it.

    Args:
        computed: tensors of the formulation that is checked.
        plain: the same tensors as plain PyTorch computes them.
        exact: the same tensors in float64.
        min_scale: smallest value that the rounding step is taken of.

    Returns:
        One figure for each tensor; infinity if it holds NaN.
    """
    errors = []
    for computed_tensor, plain_tensor, exact_tensor in zip(computed, plain, exact, strict=True):
        error, plain_error = (
            float((tensor.double() - exact_tensor).square().mean().sqrt()) for tensor in (computed_tensor, plain_tensor)
        )
        scale = max(float(exact_tensor.abs().max()), min_scale)
        allowed = plain_error + torch.finfo(plain_tensor.dtype).eps / 2 * scale
        errors.append(float("inf") if error != error else error / allowed)
    return errors


def exact_enough(errors: Mapping[str, float], title: str) -> list[str]:
    """Return the formulations that may be measured, and print a line for each one that errs too much.

    Args:
        errors: largest relative error of each formulation.
        title: description of the measurement.
    """
    names = []
    for name, error in errors.items():
        if error <= MAX_PEER_ERROR:
            names.append(name)
        else:
            print(f"{name} is left out of {title}: it errs {error:.3g} times as much as plain PyTorch")
    return names


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's type if it has no message."""
    message = str(error).strip()
    return message.splitlines()[0] if message else type(error).__name__
