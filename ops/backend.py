"""The choice between the forms of an attention primitive: its meaning in plain PyTorch, or a Triton kernel."""

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ParamSpec

import torch
from torch import Tensor

from retinue.utils.suggestions import nearest

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "triton")
P = ParamSpec("P")

_state = {"backend": "auto"}
# (primitive, obstacle) pairs whose choice by `auto` has been logged.
_logged: set[tuple[str, str | None]] = set()
# Functions that calls of primitives are redirected to, by the primitive's name.
_redirections: dict[str, Callable[..., Tensor]] = {}

# True if the installed Triton cannot compile all kernels for GPUs of compute capability 10.
OLD_TRITON = torch.__version__ < "2.11"


def set_backend(name: str) -> None:
    """Choose the back end of all primitives.

    Args:
        name: "torch" (plain PyTorch), "triton" (the Triton kernels), or "auto", which takes a kernel wherever one can
            run.

    Raises:
        ValueError: there is no back end of this name.
    """
    if name not in BACKENDS:
        raise ValueError(f"ops.backend must be {', '.join(BACKENDS)}, not {name!r}.{nearest(name, BACKENDS)}")
    _state["backend"] = name


@contextmanager
def using(name: str) -> Iterator[None]:
    """Choose the back end of all primitives, as `set_backend` does, until the context ends.

    Example:
        with using("torch"):
            out = window_attention(qkv, bias, num_heads, window)

    Raises:
        ValueError: there is no back end of this name.
    """
    previous_name = _state["backend"]
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous_name)


def primitive(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Mark a function as an attention primitive, whose calls `redirecting` can redirect."""
    name = function.__name__

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        redirection = _redirections.get(name)
        return function(*args, **kwargs) if redirection is None else redirection(function, *args, **kwargs)

    return call


@contextmanager
def redirecting(redirections: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """Redirect the calls of primitives to other functions until the context ends, to compare or to record them.

    Args:
        redirections: a function for each primitive's name. The function receives the primitive as its first argument,
            then the arguments of the call. It may call that first argument, but not the primitive by its name, which
            would be redirected again without end.

    Example:
        def scaled(primitive, qkv, *args):
            return 2 * primitive(qkv, *args)

        with redirecting({"window_attention": scaled}):
            out = net(images)
    """
    previous_redirections = dict(_redirections)
    _redirections.update(redirections)
    try:
        yield
    finally:
        _redirections.clear()
        _redirections.update(previous_redirections)


def automatic() -> bool:
    """Tell whether the back end is `auto`, so that the fastest form may be chosen, also one of another library."""
    return _state["backend"] == "auto"


def use_triton(primitive: str, obstacle: str | None) -> bool:
    """Tell whether a primitive runs as its Triton kernel, and log the choice of `auto` once for each reason.

    Args:
        primitive: the primitive's name.
        obstacle: the reason why the kernel cannot run; None if it can.

    Raises:
        ValueError: the back end is `triton` and the kernel cannot run.
    """
    backend = _state["backend"]
    if backend == "triton" and obstacle:
        raise ValueError(f"ops.backend=triton, but {primitive} cannot run as a kernel: {obstacle}")
    if backend == "auto" and not torch.compiler.is_compiling() and (primitive, obstacle) not in _logged:
        _logged.add((primitive, obstacle))
        logger.info("%s runs %s", primitive, f"in plain PyTorch: {obstacle}" if obstacle else "as a Triton kernel")
    return backend != "torch" and not obstacle


def obstacle_to_kernels(x: Tensor, head_dim: int, max_head_dim: int = 64) -> str | None:
    """Return the reason why none of our kernels can run on `x`, or None if nothing prevents them.

    Args:
        x: a tensor on the device and of the type of the computation.
        head_dim: channels of a head.
        max_head_dim: channels of the largest heads that the kernel takes.
    """
    if x.device.type != "cuda" and not (x.device.type == "cpu" and interpreted()):
        return f"it needs a CUDA device, not {x.device.type}"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    if not 1 <= head_dim <= max_head_dim:
        return f"it takes heads of at most {max_head_dim} channels, not {head_dim}"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    if OLD_TRITON and x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) >= (10, 0):
        return "on this GPU it needs torch 2.11 or newer, since the Triton of torch 2.8 cannot compile it"
    return None


def interpreted() -> bool:
    """Tell whether kernels run in Triton's interpreter, on the CPU.

    Triton reads the variable `TRITON_INTERPRET` when a kernel is defined, so it must be set before `ops.kernels` is
    imported.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"
