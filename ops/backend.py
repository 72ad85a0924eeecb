"""Which form of an attention primitive runs: its plain PyTorch meaning, or a Triton kernel."""

import logging
import os

import torch
from torch import Tensor

from retinue.utils.suggestions import nearest

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "triton")
_state = {"backend": "auto"}
_told: set[tuple[str, str | None]] = set()


def set_backend(name: str) -> None:
    """Choose for all primitives: `torch`, `triton`, or `auto`, the kernel wherever it can run.

    Raises:
        ValueError: there is no such back end.
    """
    if name not in BACKENDS:
        raise ValueError(f"ops.backend must be {', '.join(BACKENDS)}, not {name!r}.{nearest(name, BACKENDS)}")
    _state["backend"] = name


def automatic() -> bool:
    """Whether the quickest form may be chosen, from another library too."""
    return _state["backend"] == "auto"


def use_triton(primitive: str, obstacle: str | None) -> bool:
    """Whether `primitive` runs as its kernel, which `obstacle` keeps it from, if anything does.

    `auto` logs its choice once for each reason.

    Raises:
        ValueError: the kernel was asked for and cannot run.
    """
    backend = _state["backend"]
    if backend == "triton" and obstacle:
        raise ValueError(f"ops.backend=triton, but {primitive} cannot run as a kernel: {obstacle}")
    if backend == "auto" and not torch.compiler.is_compiling() and (primitive, obstacle) not in _told:
        _told.add((primitive, obstacle))
        logger.info("%s runs %s", primitive, f"in plain PyTorch: {obstacle}" if obstacle else "as a Triton kernel")
    return backend != "torch" and not obstacle


def obstacle_to_kernels(x: Tensor, head_dim: int) -> str | None:
    """What keeps any of our kernels from running on `x`: device, type, or width of a head; None: nothing does."""
    if x.device.type != "cuda" and not (x.device.type == "cpu" and interpreted()):
        return f"it needs a CUDA device, not {x.device.type}"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    if not 1 <= head_dim <= 64:
        return f"it takes heads of at most 64 channels, not {head_dim}"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU; to be asked for before they are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
