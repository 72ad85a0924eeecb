"""How exact a kernel has to be."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor


def assert_within_budget(ours: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """Each of our tensors may err by twice as much as plain PyTorch in the same type does, and a rounding.

    Errors are root mean squares, which depend less on chance than the greatest do, and show one wrong value as well.

    Args:
        ours, plain: results of the kernel and of plain PyTorch, of the same inputs and in the same type.
        truth: results of plain PyTorch in float64 of the same inputs.
    """
    for i, (a, b, exact) in enumerate(zip(ours, plain, truth, strict=True)):
        assert a.dtype == b.dtype and exact.dtype == torch.float64
        error, budget = ((t.double() - exact).square().mean().sqrt().item() for t in (a, b))
        budget = 2 * budget + torch.finfo(a.dtype).eps * exact.abs().max().item()
        assert error <= budget, f"tensor {i}: error {error:.2e}, budget {budget:.2e}"


@contextmanager
def poisoned() -> Iterator[None]:
    """Let new tensors without contents hold NaN, so that what a kernel does not write is seen; integers, the least."""

    @torch.no_grad()
    def poison(x: Tensor) -> Tensor:
        return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).min)

    make = {name: getattr(torch, name) for name in ("empty", "empty_like")}
    of_tensor = Tensor.new_empty
    with (
        mock.patch.object(torch, "empty", lambda *args, **kwargs: poison(make["empty"](*args, **kwargs))),
        mock.patch.object(torch, "empty_like", lambda *args, **kwargs: poison(make["empty_like"](*args, **kwargs))),
        mock.patch.object(Tensor, "new_empty", lambda *args, **kwargs: poison(of_tensor(*args, **kwargs))),
    ):
        yield
