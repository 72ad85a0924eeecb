"""What the Triton kernels share: how they become PyTorch operators, and how their tiles are chosen."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op, triton_op
from torch.library import wrap_triton as wrap_compiled

from ops.backend import interpreted


class Tiles(NamedTuple):
    """Tokens that a program owns, tokens that it takes at a time in its loop, its warps and its pipeline's stages."""

    own: int
    other: int
    num_warps: int
    num_stages: int


# (kernel, compute capability, bytes of a value, padded width of a head, tokens of a window)
TileKey = tuple[str, tuple[int, int], int, int, int]

# Tiles that were timed on a GPU. They take precedence over a kernel's own choice.
TUNED: dict[TileKey, Tiles] = {}

# Look-ups of tiles so far, one mapping from keys to default tiles for each open context of `recorded_lookups`.
_recordings: list[dict[TileKey, Tiles]] = []


def tiles(kernel: str, x: Tensor, width: int, tokens: int, default: Tiles) -> Tiles:
    """The tiles of `TUNED` for a kernel on the values and the device of `x`, or else `default`."""
    if not TUNED and not _recordings:
        return default
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    key = (kernel, capability, x.element_size(), width, tokens)
    for lookups in _recordings:
        lookups.setdefault(key, default)
    return TUNED.get(key, default)


@contextmanager
def recorded_lookups() -> Iterator[dict[TileKey, Tiles]]:
    """Record the keys that kernels look up in `TUNED` within the context, each with the kernel's default tiles."""
    lookups: dict[TileKey, Tiles] = {}
    _recordings.append(lookups)
    try:
        yield lookups
    finally:
        _recordings.pop()


def padded(size: int, most: int | None = None) -> int:
    """The least power of two that holds `size` and fills a tensor core's tile, which is 16; at most `most`."""
    power = 16
    while power < size and power != most:
        power *= 2
    return power


def dot_precision() -> str:
    """How `tl.dot` multiplies float32: rounded to TF32 only where PyTorch may do so as well."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def wrap_triton(kernel: Any) -> Any:
    """`torch.library.wrap_triton`, which does not know the kernels of Triton's interpreter."""
    return kernel if interpreted() else wrap_compiled(kernel)


def kernel_op(name: str, empty_outputs: Callable[..., Any]) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Decorator: an operator that launches Triton kernels, each named in a call of `wrap_triton`.

    torch.compile sees the kernels inside it, but for the interpreter's.

    Args:
        name: "retinue::..."
        empty_outputs: gives its outputs' shapes: takes the operator's arguments, also on the meta device.
    """

    def decorate(launch: Callable[..., Any]) -> CustomOpDef:
        @functools.wraps(launch)
        def on_device_of_first(*args):
            with torch.cuda.device_of(args[0]):  # Triton launches on the current device, whichever holds the tensors
                return launch(*args)

        make = custom_op if interpreted() else triton_op
        op = cast(CustomOpDef, make(name, on_device_of_first, mutates_args=()))
        op.register_fake(empty_outputs)
        return op

    return decorate


def forbid_second_derivative(backward: CustomOpDef) -> None:
    """Let the derivative of an operator that is itself a backward pass raise a ValueError."""

    def refuse(ctx, *grads):
        raise ValueError("the Triton kernels have no second derivative: choose ops.backend=torch")

    backward.register_autograd(refuse)
