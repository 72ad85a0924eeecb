"""Search for the fastest tiles of the Triton kernels on this GPU, as lines of `TUNED` in ops/kernels/launch.py.

The candidates of a kernel are its module's `configs`. The search starts from the kernel's own choice and repeatedly
tries all candidates that differ from the best one in one number, until none of them is faster. That takes some dozens
of compilations, where trying all candidates would take hundreds.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from retinue.benchmarks.layers import Layer, layers
from retinue.benchmarks.options import Pair
from retinue.benchmarks.primitives import Inputs, check, make_inputs, make_step
from retinue.benchmarks.timing import describe_device, interleave

ROUNDS = 15


def kernels_module(primitive: str) -> ModuleType:
    """Return the module with the Triton kernels of a primitive."""
    return importlib.import_module(f"ops.kernels.{primitive}")


def coordinate_descent(
    start: Any, candidates: Sequence[Any], seconds: Callable[[Any], float]
) -> tuple[Any, Mapping[Any, float]]:
    """Find the fastest candidate that can be reached from `start` by changing one number at a time.

    Args:
        start: the candidate to begin with, a tuple of numbers.
        candidates: tuples of the same length.
        seconds: measures a candidate.

    Returns:
        The fastest candidate, and the seconds of each candidate that was measured.
    """
    times = {start: seconds(start)}
    best, previous_best = start, None
    while best != previous_best:
        previous_best = best
        for candidate in candidates:
            differences = sum(a != b for a, b in zip(candidate, previous_best, strict=True))
            if candidate not in times and differences == 1:
                times[candidate] = seconds(candidate)
        best = min(times, key=times.__getitem__)
    return best, times


def agree(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors differ by roundings only.

    This is a quick test for each candidate; the best one must also pass the stricter `primitives.check`.
    """
    return float((a - b).norm()) <= 0.01 * float(b.norm())


def tune(layer: Layer, inputs: Inputs, done: set[tuple], rounds: int = ROUNDS) -> list[str]:
    """Tune the kernels of a layer, and use the tiles that were found from then on.

    Args:
        layer: the layer that calls the primitive.
        inputs: inputs of the layer.
        done: keys of `TUNED` that are skipped; the keys that are tuned here are added.
        rounds: how often each candidate is timed.

    Returns:
        Lines for `TUNED`, one for each kernel that was tuned.

    Raises:
        ValueError: the kernels are not exact with the tiles that were found.
    """
    from triton.errors import TritonError

    from ops.kernels import launch

    train, infer = (make_step(layer, layer.primitive, inputs, train) for train in (True, False))
    with launch.recorded_lookups() as lookups:
        reference = train()
    lines = []
    for key, default in lookups.items():
        if key in done:
            continue
        done.add(key)
        kernel, *_, tokens = key
        step = infer if kernel.endswith(".forward") else train

        def seconds(tiles: Any, key: Any = key, step: Callable[[], object] = step) -> float:
            launch.TUNED[key] = tiles
            try:
                exact = all(map(agree, train(), reference))
            except (RuntimeError, TritonError):
                # These tiles do not fit the GPU.
                return float("inf")
            if not exact:
                return float("inf")
            return interleave({"step": step}, rounds, on_gpu=inputs.qkv.is_cuda)["step"].median

        best, times = coordinate_descent(default, kernels_module(layer.primitive).configs(tokens), seconds)
        launch.TUNED[key] = best
        gain = f"{1e3 * times[best]:.4g} ms, by default {1e3 * times[default]:.4g} ms"
        comment = f"{gain}, {len(times)} tried, {layer.describe(inputs.batch)}"
        lines.append(f"    {key!r}: {type(best).__name__}{tuple(best)},  # {comment}")
    check(layer, [layer.primitive], inputs)
    return lines


def tune_all(primitives: Sequence[str], batches: Mapping[Pair, int], dtype: torch.dtype, device: torch.device) -> None:
    """Tune the kernels of primitives in the layers of nets, and print the lines for `TUNED`.

    Args:
        primitives: names of the primitives.
        batches: images of a batch for each image size (height, width).
        dtype: type of the computation.
        device: a CUDA device.
    """
    done: set[tuple] = set()
    console = Console(width=240, highlight=False)
    console.print(f"For TUNED in ops/kernels/launch.py, on {describe_device(device)}:", markup=False)
    for image_size, batch in batches.items():
        for primitive in primitives:
            for layer in layers(primitive, image_size):
                for line in tune(layer, make_inputs(layer, batch, dtype, device), done):
                    console.print(line, markup=False, soft_wrap=True)
