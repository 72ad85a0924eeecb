"""The formulations of each attention primitive, and the reasons why one of them cannot run."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ops import functional, linear, neighborhood, scan
from ops.backend import using
from retinue.benchmarks import peers
from retinue.benchmarks.options import Pair

Attend = Callable[..., Tensor]

# Largest dense attention mask, in entries, that we allocate, by the type of the device.
MAX_MASK_ENTRIES = {"cuda": 2**31, "cpu": 2**23}
# Largest map, in tokens, for which FlexAttention's mask is made: that takes all pairs of tokens.
MAX_FLEX_TOKENS = 2**15

PLAIN_PYTORCH, TORCH_COMPILE = "plain PyTorch", "torch.compile"


@dataclass(frozen=True)
class Call:
    """The properties of a call that decide whether a formulation can run.

    Attributes:
        batch: images of the batch.
        size: (H, W) of the map, in tokens.
        device: type of the device: "cpu" or "cuda".
        window_tokens: tokens of a window of routed attention, 0 for other primitives.
        biased: the scores have a bias.
    """

    batch: int
    size: Pair
    device: str
    window_tokens: int = 0
    biased: bool = False


@dataclass(frozen=True)
class Formulation:
    """One way to compute a primitive.

    Attributes:
        attend: a function with the arguments of the primitive.
        obstacles: functions that return the reason why `attend` cannot run a call, or None if it can.
        external: a compiler or a library that is not ours does the work, so any error leaves out the formulation only.
    """

    attend: Attend
    obstacles: tuple[Callable[[Call], str | None], ...] = ()
    external: bool = False

    def obstacle(self, call: Call) -> str | None:
        """Return the first reason why the formulation cannot run `call`, or None if it can."""
        return next((reason for find in self.obstacles if (reason := find(call))), None)


def mask_too_large(call: Call) -> str | None:
    """Return the reason why a dense mask between all tokens cannot be allocated, or None if it can."""
    entries = call.batch * (call.size[0] * call.size[1]) ** 2
    max_entries = MAX_MASK_ENTRIES.get(call.device, 0)
    if entries <= max_entries:
        return None
    return f"its mask would have {entries:.1e} entries, more than {max_entries:.1e}"


def not_on_cuda(call: Call) -> str | None:
    """Return the reason why the device does not suffice, or None on a CUDA device."""
    return None if call.device == "cuda" else f"it is measured on a CUDA device, not on {call.device}"


def windows_not_in_blocks(call: Call) -> str | None:
    """Return the reason why windows do not consist of FlexAttention's blocks, or None if they do."""
    if call.window_tokens % peers.FLEX_BLOCK == 0:
        return None
    return f"its windows must have a multiple of {peers.FLEX_BLOCK} tokens, not {call.window_tokens} tokens"


def too_many_pairs(call: Call) -> str | None:
    """Return the reason why FlexAttention's mask would be too expensive to make, or None if it is not."""
    tokens = call.size[0] * call.size[1]
    return f"its mask of {tokens} tokens is made from all pairs of tokens" if tokens > MAX_FLEX_TOKENS else None


def natten_missing(call: Call) -> str | None:
    """Return the reason why NATTEN cannot run, or None if it is installed."""
    return None if neighborhood.NATTEN_INSTALLED else "natten is not installed"


def biased(call: Call) -> str | None:
    """Return the reason why a formulation without a bias cannot run, or None if the call has no bias."""
    return "it does not support a bias" if call.biased else None


def with_backend(name: str, attend: Attend) -> Attend:
    """Return a function that runs `attend` with `ops.backend` set to `name`."""

    @functools.wraps(attend)
    def run(*args: Any) -> Tensor:
        with using(name):
            return attend(*args)

    return run


def compiled(attend: Attend) -> Formulation:
    """Return the formulation in which torch.compile compiles the primitive's plain PyTorch form."""
    run = with_backend("torch", torch.compile(attend, dynamic=False))
    return Formulation(run, (not_on_cuda,), external=True)


# For each primitive: ours first, then the baseline that speed-ups are relative to, then other peers.
FORMULATIONS: dict[str, dict[str, Formulation]] = {
    "routed_attention": {
        "routed_attention": Formulation(with_backend("auto", functional.routed_attention)),
        "gather, matmul, softmax": Formulation(peers.authors_routed),
        "index_select + SDPA": Formulation(functional.gathered_attention),
        "masked SDPA": Formulation(peers.masked_routed, (mask_too_large,)),
        "FlexAttention": Formulation(peers.flex_routed, (not_on_cuda, windows_not_in_blocks), external=True),
        TORCH_COMPILE: compiled(functional.routed_attention),
    },
    "window_attention": {
        "window_attention": Formulation(with_backend("auto", functional.window_attention)),
        "cut, matmul, softmax": Formulation(peers.authors_window),
        "cut, masked SDPA": Formulation(peers.masked_window),
        "FlexAttention": Formulation(peers.flex_window, (not_on_cuda,), external=True),
        TORCH_COMPILE: compiled(functional.window_attention),
    },
    "neighborhood_attention": {
        "neighborhood_attention": Formulation(with_backend("auto", neighborhood.neighborhood_attention)),
        PLAIN_PYTORCH: Formulation(with_backend("torch", neighborhood.neighborhood_attention)),
        "gather, matmul, softmax": Formulation(peers.gathered_neighborhood),
        "masked SDPA": Formulation(peers.masked_neighborhood, (mask_too_large,)),
        "FlexAttention": Formulation(peers.flex_neighborhood, (not_on_cuda, too_many_pairs), external=True),
        "NATTEN": Formulation(peers.natten_neighborhood, (not_on_cuda, natten_missing, biased), external=True),
        "NATTEN, FlexAttention": Formulation(
            peers.natten_flex_neighborhood, (not_on_cuda, natten_missing, biased), external=True
        ),
        TORCH_COMPILE: compiled(neighborhood.neighborhood_attention),
    },
    "linear_attention": {
        "linear_attention": Formulation(with_backend("auto", linear.linear_attention)),
        PLAIN_PYTORCH: Formulation(with_backend("torch", linear.linear_attention)),
        "all pairs of tokens": Formulation(peers.quadratic_linear, (mask_too_large,)),
        TORCH_COMPILE: compiled(linear.linear_attention),
    },
    "selective_scan": {
        "selective_scan": Formulation(with_backend("auto", scan.selective_scan)),
        PLAIN_PYTORCH: Formulation(with_backend("torch", scan.selective_scan)),
        TORCH_COMPILE: compiled(scan.selective_scan),
    },
}
