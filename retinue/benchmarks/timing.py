"""Tools that all benchmarks share: timing in turn, peak memory, and one format of rows."""

import contextlib
import csv
import gc
import math
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from retinue.utils.files import replacing

Row = dict[str, str | int | float | None]

# Bytes that are written to flush the GPU's cache: several times the cache of any GPU.
FLUSHED_BYTES = 2**29
# Cycles for which the GPU waits while the kernels of a call are queued: some milliseconds.
QUEUEING_CYCLES = 5_000_000


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one figure per round."""

    seconds: tuple[float, ...]

    @classmethod
    def sum(cls, parts: Sequence[tuple[int, "Timing"]]) -> "Timing":
        """Return the total time of running each call `count` times; parts are (count, timing)."""
        return cls(tuple(np.sum([count * np.array(timing.seconds) for count, timing in parts], axis=0).tolist()))

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def p20(self) -> float:
        return float(np.percentile(self.seconds, 20))

    @property
    def p80(self) -> float:
        return float(np.percentile(self.seconds, 80))

    def speedup(self, other: "Timing") -> float:
        """Return the speed relative to `other`, which was timed in the same rounds: the median of the rounds' ratios.

        A load on the machine slows both, so this is steadier than a ratio of medians.
        """
        return float(np.median(np.divide(other.seconds, self.seconds)))


def interleave(
    callables: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    warmup: int = 2,
    min_seconds: float = 0.0,
    on_gpu: bool = False,
) -> dict[str, Timing]:
    """Time the callables in turn, round by round, with the order reversed in every second round.

    Args:
        callables: the functions to time, by name. If a GPU is in use, a call ends when the GPU has finished.
        rounds: number of rounds.
        warmup: calls of each function before the first round.
        min_seconds: minimum time of a round: a quicker function is called several times, and the mean is recorded.
        on_gpu: make one call per round, record the GPU's own time between two events, and flush its cache before.
    """
    cache = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda") if on_gpu else None
    calls = {}
    for name, call in callables.items():
        for _ in range(warmup):
            call()
        calls[name] = math.ceil(min_seconds / _seconds(call, 1)) if min_seconds else 1
    samples: dict[str, list[float]] = {name: [] for name in callables}
    for i in range(rounds):
        order = list(callables)
        if i % 2:
            order.reverse()
        for name in order:
            if cache is None:
                samples[name].append(_seconds(callables[name], max(1, calls[name])))
            else:
                samples[name].append(_gpu_seconds(callables[name], cache))
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def _gpu_seconds(call: Callable[[], object], cache: torch.Tensor) -> float:
    """Return the seconds from the start of a call's first kernel to the end of its last kernel."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    cache.zero_()
    torch.cuda._sleep(QUEUEING_CYCLES)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _seconds(call: Callable[[], object], calls: int) -> float:
    """Return the mean seconds of a call."""
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize()
    return (time.perf_counter() - start) / calls


def synchronize() -> None:
    """Wait for the GPU, if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory_mb(make: Callable[[], Callable[[], object]], device: str | torch.device) -> float:
    """Return the peak memory, in MB (10^6 bytes), of building a function and calling it twice.

    On a GPU, this is the maximum that PyTorch's allocator held for tensors (`max_memory_allocated`), less what it held
    before. On the CPU, `make` runs in a process of its own, and the figure is the growth of that process's resident
    set: weights, activations and the scratch memory of libraries, but neither the interpreter nor the imports.

    Args:
        make: builds and returns the function. For the CPU it must be picklable.
        device: the device on which the function runs.
    """
    if torch.device(device).type == "cuda":
        return used_memory_mb(make, device)[1]
    # All processes forked from a fork server start equal: with the imports done and without threads.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["__main__", "timm"])
    with ProcessPoolExecutor(1, mp_context=server) as pool:
        return pool.submit(_resident_growth, make, torch.get_num_threads()).result() / 1e6


def used_memory_mb(
    make: Callable[[], Callable[[], object]], device: str | torch.device
) -> tuple[Callable[[], object], float]:
    """Build a function on a GPU and call it twice; return the function and its peak memory as in `peak_memory_mb`."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step = make()
    run_twice(step)
    return step, (torch.cuda.max_memory_allocated(device) - before) / 1e6


def run_twice(step: Callable[[], object]) -> None:
    """Run a step twice and wait for the GPU."""
    # The first step allocates gradients and the optimiser's state; the second step runs with them.
    step()
    step()
    synchronize()


def kernels_of(step: Callable[[], object]) -> tuple[int, float]:
    """Return the number of kernels and copies that a step starts on a GPU, and the seconds that they take together."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
        synchronize()
    events = [event for event in recorded.key_averages() if event.device_type == DeviceType.CUDA]
    return sum(event.count for event in events), sum(event.self_device_time_total for event in events) / 1e6


def _resident_growth(make: Callable[[], Callable[[], object]], threads: int) -> int:
    torch.set_num_threads(threads)
    before = _peak_resident()
    run_twice(make())
    return _peak_resident() - before


def _peak_resident() -> int:
    """Return the peak resident set in bytes; Linux reports KiB, macOS bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def make_row(
    what: str,
    timing: Timing,
    *,
    shape: str,
    dtype: str,
    device: str | torch.device,
    against: tuple[str, Timing] | None = None,
    peak_mb: float | None = None,
    **extra: str | int | float | None,
) -> Row:
    """Return one row of a benchmark.

    Args:
        what: name of what was timed.
        timing: its time.
        shape: shape of the input, in words.
        dtype: type of the computation.
        device: device of the computation.
        against: name and timing of the baseline; the column `ratio` is the speed relative to it.
        peak_mb: peak memory in MB (10^6 bytes).
        extra: further columns, which precede the last column, `versions`.
    """
    return {
        "what": what,
        "against": against[0] if against else None,
        "ratio": timing.speedup(against[1]) if against else None,
        "shape": shape,
        "dtype": dtype,
        "device": describe_device(device),
        "median_ms": 1e3 * timing.median,
        "p20_ms": 1e3 * timing.p20,
        "p80_ms": 1e3 * timing.p80,
        "peak_mb": peak_mb,
        **extra,
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }


def print_rows(rows: Sequence[Row], title: str | None = None) -> None:
    """Print the rows as a table, and below it the text columns that are the same in all rows."""
    columns = [c for c in _columns(rows) if any(row.get(c) is not None for row in rows)]
    words = [c for c in columns if not any(isinstance(row.get(c), int | float) for row in rows)]
    common = [c for c in words if c != "what" and len({row.get(c) for row in rows}) == 1]
    caption = "; ".join(f"{c}: {rows[0][c]}" for c in common)
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for column in columns:
        if column not in common:
            table.add_column(column, justify="left" if column in words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_format(row.get(column)) for column in columns if column not in common))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _format(value: str | int | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def write_csv(path: str | Path, rows: Sequence[Row]) -> None:
    """Write all rows with every column that any of the rows has; numbers are not rounded."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def _columns(rows: Sequence[Row]) -> list[str]:
    """Return the columns in the order in which they first appear, with `versions` last."""
    columns = dict.fromkeys(column for row in rows for column in row)
    return sorted(columns, key=lambda column: column == "versions")


def versions() -> dict[str, str]:
    """Return the versions of the packages that a timing depends on."""
    numbers = {"python": platform.python_version()}
    for package in ("torch", "timm", "triton"):
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            continue
    return numbers


def autocast(device: str | torch.device, dtype: str, cache_enabled: bool = True) -> contextlib.AbstractContextManager:
    """Return the autocast context for a type such as "bfloat16", which does nothing for "float32".

    Args:
        device: device of the computation.
        dtype: type of the computation.
        cache_enabled: keep the casts of weights until the context ends.
    """
    enabled = dtype != "float32"
    return torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled, cache_enabled)


def describe_device(device: str | torch.device) -> str:
    """Return the GPU's name, such as "NVIDIA H200", or the processor's name and the number of threads in use."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    # platform.processor() is empty on some systems.
    candidates = [*names, platform.processor(), platform.machine()]
    name = next((candidate for candidate in candidates if candidate), "unknown processor")
    threads = torch.get_num_threads()
    return f"{name}, {threads} {'thread' if threads == 1 else 'threads'}"


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of this name, and make a GPU the current one: `synchronize` waits for the current GPU only.

    Args:
        name: "cpu", "cuda", "cuda:N", or "auto", which is the GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    devices = ["cpu", "cuda", *gpus] if gpus else ["cpu"]
    if name not in devices:
        raise ValueError(f"device must be auto, cpu or one of the {len(gpus)} GPUs (cuda:N), not {name!r}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    return device


def device_rates(device: torch.device, dtype: torch.dtype, rounds: int = 10) -> tuple[float, float]:
    """Measure the device's rates of copying, in bytes/s (read plus written), and of matrix products, in FLOP/s.

    Args:
        device: the device to measure.
        dtype: type of the matrices.
        rounds: how often both are timed.
    """
    cuda = device.type == "cuda"
    source = torch.empty(2**30 if cuda else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if cuda else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    calls: Mapping[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    timings = interleave(calls, rounds, on_gpu=cuda)
    return 2 * source.numel() / timings["copy"].median, 2 * n**3 / timings["product"].median
