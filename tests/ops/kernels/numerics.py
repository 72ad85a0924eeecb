"""Checks of the numerical accuracy of kernels."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ops import backend


def in_two_types(cases: Iterable[str]) -> list:
    """Return each case in float32, then in float16, where all but the first one are slow tests."""
    first, *others = cases
    half = [pytest.param(case, torch.float16, marks=pytest.mark.slow) for case in others]
    return [*((case, torch.float32) for case in (first, *others)), (first, torch.float16), *half]


def root_mean_square_error(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact).square().mean().sqrt().item()


def assert_within_budget(actual: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Check that the error of each tensor is at most twice the error of plain PyTorch, plus one rounding error.

    Errors are root mean squares. They vary less by chance than maximum errors, and a single wrong value shows in them
    as well.

    Args:
        actual: results of the kernel.
        plain: results of plain PyTorch for the same inputs in the same data type.
        exact: results of plain PyTorch for the same inputs in float64.
    """
    for i, (actual_tensor, plain_tensor, exact_tensor) in enumerate(zip(actual, plain, exact, strict=True)):
        assert actual_tensor.dtype == plain_tensor.dtype and exact_tensor.dtype == torch.float64
        error = root_mean_square_error(actual_tensor, exact_tensor)
        rounding_error = torch.finfo(actual_tensor.dtype).eps * exact_tensor.abs().max().item()
        budget = 2 * root_mean_square_error(plain_tensor, exact_tensor) + rounding_error
        assert error <= budget, f"tensor {i}: error {error:.2e}, budget {budget:.2e}"


def assert_trains_in_half_precision(op: nn.Module, x: Tensor) -> None:
    """Check outputs and gradients of an op on kernels under float16 autocast.

    They must be the same bits when checkpointing computes the forward pass again, and close to those of plain PyTorch.
    """

    def step(forward: Callable[[Tensor], Any]) -> list[Tensor]:
        op.zero_grad()
        with torch.autocast("cpu", torch.float16):
            out = forward(x)
        assert out.dtype == torch.float16
        out.float().square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in op.parameters() if p.grad is not None)]

    on_kernels = step(op)
    assert len(on_kernels) == 1 + len(list(op.parameters()))
    checkpointed = step(partial(checkpoint, op, use_reentrant=False))
    for actual, expected in zip(checkpointed, on_kernels, strict=True):
        assert torch.equal(actual, expected)
    backend._state["backend"] = "torch"
    for plain, actual in zip(step(op), on_kernels, strict=True):
        assert (plain - actual).abs().max() < 4e-3 * actual.abs().max() and actual.abs().max() > 0


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill uninitialised tensors with NaN, or with the minimum of integers, so that unwritten values fail a test."""

    @torch.no_grad()
    def poison(x: Tensor) -> Tensor:
        return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).min)

    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty
    with (
        mock.patch.object(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs))),
        mock.patch.object(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs))),
        mock.patch.object(Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs))),
    ):
        yield
