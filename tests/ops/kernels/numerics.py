"""How exact a kernel has to be."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ops import backend


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


def assert_trains_in_half_precision(op: nn.Module, x: Tensor) -> None:
    """Under autocast, an op on kernels is as good as on plain PyTorch, and the same when its forward is recomputed."""

    def step(forward: Callable[[Tensor], Any]) -> list[Tensor]:
        op.zero_grad()
        with torch.autocast("cpu", torch.float16):
            out = forward(x)
        assert out.dtype == torch.float16
        out.float().square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in op.parameters() if p.grad is not None)]

    plainly = step(op)
    assert len(plainly) == 1 + len(list(op.parameters()))
    for ours, theirs in zip(step(partial(checkpoint, op, use_reentrant=False)), plainly, strict=True):
        assert torch.equal(ours, theirs)
    backend._state["backend"] = "torch"
    for ours, theirs in zip(step(op), plainly, strict=True):
        assert (ours - theirs).abs().max() < 4e-3 * theirs.abs().max() and theirs.abs().max() > 0


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
