"""Tiles of the Triton kernels that are quickest on the GPU at hand, as lines of `TUNED` in ops/kernels/launch.py.

A kernel's candidates are its module's `configs`. From the kernel's own choice on, those are tried that differ from the
best so far in one number, until none is quicker: some dozens of compilations, where all would be hundreds.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor

from retinue.benchmarks.layers import Inputs, Layer, check, layers, make_inputs, make_step
from retinue.benchmarks.peers import Pair
from retinue.benchmarks.timing import describe_device, interleave

ROUNDS = 15


class Kernel(NamedTuple):
    """What `launch.tiles` is asked for."""

    name: str  # "routed_attention.forward"
    width: int
    tokens: int
    default: tuple[int, ...]


def kernels_module(primitive: str) -> Any:
    return importlib.import_module(f"ops.kernels.{primitive}")


@contextmanager
def asked(primitive: str) -> Iterator[dict[Kernel, Any]]:
    """Notes which kernels look up their tiles, with what default."""
    module = kernels_module(primitive)
    own, seen = module.tiles, {}

    def note(kernel: str, x: Tensor, width: int, tokens: int, default: Any) -> Any:
        seen[Kernel(kernel, width, tokens, tuple(default))] = None
        return own(kernel, x, width, tokens, default)

    with mock.patch.object(module, "tiles", note):
        yield seen


def descend(start: Any, candidates: Sequence[Any], seconds: Callable[[Any], float]) -> tuple[Any, Mapping[Any, float]]:
    """The quickest of the candidates that can be reached from `start` by one number at a time, and all times taken."""
    times = {start: seconds(start)}
    best, former = start, None
    while best != former:
        former = best
        for candidate in candidates:
            if candidate not in times and sum(a != b for a, b in zip(candidate, former, strict=True)) == 1:
                times[candidate] = seconds(candidate)
        best = min(times, key=times.__getitem__)
    return best, times


def near(a: Tensor, b: Tensor) -> bool:
    """Whether they differ by roundings only; `op_layers.check` is stricter, and follows for the best."""
    return float((a - b).norm()) <= 0.01 * float(b.norm())


def tune(layer: Layer, inputs: Inputs, done: set[tuple], rounds: int = ROUNDS) -> list[str]:
    """Lines for `TUNED`, one a kernel of the layer that is not `done`; the tiles are in use from then on.

    Raises:
        ValueError: the kernels are not exact with them.
    """
    from triton.errors import TritonError

    from ops.kernels import launch

    names = [layer.primitive]
    train, infer = (make_step(layer, layer.primitive, inputs, train) for train in (True, False))
    with asked(layer.primitive) as seen:
        reference = train()
    capability = torch.cuda.get_device_capability() if inputs.qkv.is_cuda else (0, 0)
    itemsize, lines = inputs.qkv.element_size(), []
    for kernel in seen:
        key = (kernel.name, capability, itemsize, kernel.width, kernel.tokens)
        if key in done:
            continue
        done.add(key)
        step = infer if kernel.name.endswith(".forward") else train

        def seconds(tiles: Any, key: Any = key, step: Callable[[], object] = step) -> float:
            launch.TUNED[key] = tiles
            try:
                agrees = all(map(near, train(), reference))
            except (RuntimeError, TritonError):  # they do not fit the GPU
                return float("inf")
            return interleave({"": step}, rounds, on_gpu=inputs.qkv.is_cuda)[""].median if agrees else float("inf")

        start = launch.Tiles(*kernel.default)
        best, times = descend(start, kernels_module(layer.primitive).configs(kernel.tokens), seconds)
        launch.TUNED[key] = best
        gain = f"{1e3 * times[best]:.4g} ms, by default {1e3 * times[start]:.4g} ms"
        lines.append(f"    {key!r}: Tiles{tuple(best)},  # {gain}, {len(times)} tried, {layer.describe(len(inputs))}")
    check(layer, names, inputs)
    return lines


def tune_all(primitives: Sequence[str], batches: Mapping[Pair, int], dtype: torch.dtype, device: torch.device) -> None:
    """Tune for images of these sizes and numbers, and print the lines."""
    done: set[tuple] = set()
    console = Console(width=240, highlight=False)
    console.print(f"For TUNED in ops/kernels/launch.py, on {describe_device(device)}:", markup=False)
    for size, batch in batches.items():
        for primitive in primitives:
            for layer in layers(primitive, size):
                for line in tune(layer, make_inputs(layer, batch, dtype, device), done):
                    console.print(line, markup=False, soft_wrap=True)
