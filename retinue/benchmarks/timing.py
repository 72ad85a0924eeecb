"""What the benchmark scripts share: interleaved timing, peak memory, and one format of rows."""

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

from retinue.utils.files import replacing

Row = dict[str, str | int | float | None]

FLUSHED_BYTES = 2**29  # several times the cache of any GPU
QUEUEING_CYCLES = 5_000_000  # some milliseconds, in which the kernels of a call are queued


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one figure a round."""

    seconds: tuple[float, ...]

    @classmethod
    def sum(cls, parts: Sequence[tuple[int, "Timing"]]) -> "Timing":
        """Of calls one after another: how many of each."""
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
        """How many times quicker than `other`, which was timed in the same rounds: the median of the rounds' ratios.

        What slows the machine for a while slows both, so this is steadier than a ratio of medians.
        """
        return float(np.median(np.divide(other.seconds, self.seconds)))


def interleave(
    callables: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    warmup: int = 2,
    min_seconds: float = 0.0,
    on_gpu: bool = False,
) -> dict[str, Timing]:
    """Time the callables in turn, round by round, the order reversed in every second round.

    A call is finished when the GPU, if one is in use, is. A callable quicker than `min_seconds` is called as many
    times in a round as fill them, and the mean counts. With `on_gpu` a round is one call, of which the GPU's own time
    between two events counts, with other data in its cache before.
    """
    cache = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda") if on_gpu else None
    calls = {}
    for name, call in callables.items():
        for _ in range(warmup):
            call()
        calls[name] = math.ceil(min_seconds / _seconds(call, 1)) if min_seconds else 1
    samples: dict[str, list[float]] = {name: [] for name in callables}
    for i in range(rounds):
        for name in list(callables)[:: -1 if i % 2 else 1]:
            if cache is None:
                samples[name].append(_seconds(callables[name], max(1, calls[name])))
            else:
                samples[name].append(_gpu_seconds(callables[name], cache))
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def _gpu_seconds(call: Callable[[], object], cache: torch.Tensor) -> float:
    """Seconds from the start of a call's first kernel to the end of its last."""
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
    """Mean seconds of a call."""
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
    """Peak memory in MB (10^6 bytes) of what `make` builds and of two calls of the function that it returns.

    On a GPU what the allocator holds for tensors at most (`max_memory_allocated`), less what was held before. On the
    CPU `make` (which must be picklable) runs in a process of its own, and the figure is the growth of that process's
    resident set: weights, activations and the libraries' scratch memory, the interpreter and the imports left out.
    """
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _run_twice(make)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    server = multiprocessing.get_context("forkserver")  # its forks start alike, with the imports done and no threads
    server.set_forkserver_preload(["__main__", "timm"])
    with ProcessPoolExecutor(1, mp_context=server) as pool:
        return pool.submit(_resident_growth, make, torch.get_num_threads()).result() / 1e6


def _run_twice(make: Callable[[], Callable[[], object]]) -> None:
    step = make()
    step()
    step()  # gradients and the optimiser's state are there from the first step on
    synchronize()


def _resident_growth(make: Callable[[], Callable[[], object]], threads: int) -> int:
    torch.set_num_threads(threads)
    before = _peak_resident()
    _run_twice(make)
    return _peak_resident() - before


def _peak_resident() -> int:
    """Bytes. The system counts in KiB, macOS in bytes."""
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
    """One line of a benchmark. `ratio` is the speed over that of `against`; `extra` columns stand before `versions`."""
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
    """A table on stdout; words that are the same in all rows stand below it."""
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
    """All rows, with every column that any of them has; numbers unrounded."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def _columns(rows: Sequence[Row]) -> list[str]:
    """In the order in which they first come; versions last."""
    columns = dict.fromkeys(column for row in rows for column in row)
    return sorted(columns, key=lambda column: column == "versions")


def versions() -> dict[str, str]:
    """Of what a timing depends on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "timm", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def autocast(device: str | torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Return the autocast context for a type such as "bfloat16", which does nothing for "float32"."""
    return torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != "float32")


def describe_device(device: str | torch.device) -> str:
    """'NVIDIA H200', or the processor's name and the number of threads in use."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name, threads = names[0] if names else platform.processor() or platform.machine(), torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the GPU where there is one; a GPU becomes the current one, for which alone `synchronize` waits.

    Raises:
        ValueError: a GPU is asked for that is not there, or something else.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name not in ("cpu", *gpus, *["cuda"] * bool(gpus)):
        raise ValueError(f"device must be auto, cpu or one of the {len(gpus)} GPUs (cuda:N), not {name!r}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    return device
