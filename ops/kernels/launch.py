"""Launching Triton kernels: how they become PyTorch operators, and which tile sizes they use."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op, triton_op
from torch.library import wrap_triton as wrap_compiled

from ops.backend import interpreted


class TileConfig(NamedTuple):
    """Tile sizes and compiler options of one kernel.

    Attributes:
        resident: number of tokens that a program keeps in registers during its whole loop.
        streamed: number of tokens that a program loads in each iteration of its loop.
        num_warps: number of warps per program.
        num_stages: number of stages of the software pipeline that overlaps loads with products.
    """

    resident: int
    streamed: int
    num_warps: int
    num_stages: int


# Kernel, compute capability, bytes per value, padded head dimension, tokens per window or frame.
TileKey = tuple[str, tuple[int, int], int, int, int]

# Tile configurations that were timed on a GPU. They replace the default of a kernel.
TUNED: dict[TileKey, TileConfig] = {}

# Lookups so far, as a mapping from keys to defaults for each open context of `recorded_lookups`.
_recordings: list[dict[TileKey, TileConfig]] = []


def tile_config(kernel: str, x: Tensor, padded_head_dim: int, tokens: int, default: TileConfig) -> TileConfig:
    """Return the entry of `TUNED` for a kernel on the data type and the device of `x`, or `default` if there is none.

    Args:
        kernel: "<primitive>.<kernel>", such as "routed_attention.forward".
        x: input of the kernel; only its data type and its device matter.
        padded_head_dim: number of channels per head after padding.
        tokens: number of tokens per window or frame.
        default: the kernel's own choice.
    """
    if not TUNED and not _recordings:
        return default
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    key = (kernel, capability, x.element_size(), padded_head_dim, tokens)
    for lookups in _recordings:
        lookups.setdefault(key, default)
    return TUNED.get(key, default)


@contextmanager
def recorded_lookups() -> Iterator[dict[TileKey, TileConfig]]:
    """Record the keys that kernels look up in `TUNED` within the context, each with the kernel's default."""
    lookups: dict[TileKey, TileConfig] = {}
    _recordings.append(lookups)
    try:
        yield lookups
    finally:
        _recordings.pop()


def padded(size: int, limit: int | None = None) -> int:
    """Return the smallest power of two that is at least `size` and 16, but at most `limit`.

    A side of a tensor core's tile has 16 values, so `tl.dot` takes no fewer.

    Args:
        size: number of values to hold.
        limit: a power of two, at least 16; None for no limit.
    """
    power = 16
    while power < size and power != limit:
        power *= 2
    return power


def dot_precision() -> str:
    """Return the `input_precision` of `tl.dot` for float32: TF32 only where PyTorch is allowed to use TF32."""
    matmul = torch.backends.cuda.matmul
    # torch 2.8 has only `allow_tf32`; later versions refuse to read it once `fp32_precision` was set.
    precision = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed else "ieee"


def wrap_triton(kernel: Any) -> Any:
    """Return `torch.library.wrap_triton(kernel)`, or the kernel itself in Triton's interpreter.

    `torch.library.wrap_triton` refuses the interpreter's kernels.
    """
    return kernel if interpreted() else wrap_compiled(kernel)


def kernel_op(name: str, empty_outputs: Callable[..., Any]) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Return a decorator that makes a PyTorch operator of a function that launches Triton kernels.

    The function calls `wrap_triton` on each kernel that it launches, so that torch.compile sees the kernels inside the
    operator. In Triton's interpreter the operator is opaque to torch.compile.

    Args:
        name: name of the operator, "retinue::<name>".
        empty_outputs: function that takes the operator's arguments, on any device including meta, and returns
            uninitialised tensors with the shapes and the data types of the outputs.
    """

    def decorate(launch: Callable[..., Any]) -> CustomOpDef:
        @functools.wraps(launch)
        def launch_on_device_of_first(*args):
            # Triton launches on the current device, even if the tensors are on another one.
            with torch.cuda.device_of(args[0]):
                return launch(*args)

        make_op = custom_op if interpreted() else triton_op
        op = cast(CustomOpDef, make_op(name, launch_on_device_of_first, mutates_args=()))
        op.register_fake(empty_outputs)
        return op

    return decorate


def forbid_second_derivative(backward: CustomOpDef) -> None:
    """Register a derivative that raises a ValueError for an operator that computes a backward pass.

    Args:
        backward: the operator that computes the first derivative.
    """

    def refuse(ctx, *grads):
        raise ValueError("the Triton kernels have no second derivative: choose ops.backend=torch")

    backward.register_autograd(refuse)
