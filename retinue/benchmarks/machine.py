"""The machine that a benchmark ran on: its description, and the power that its GPU draws."""

import os
import platform
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from retinue.benchmarks.timing import describe_device, synchronize

# Seconds between two readings of the power.
SAMPLING_SECONDS = 0.02
# Seconds for which a call is repeated before its energy is measured, and while it is measured. The reading of many GPUs
# is a mean over the last second, so the energy counts only when the load has lasted longer than that.
SETTLING_SECONDS, ENERGY_SECONDS = 1.5, 3.0

PowerMeter = Callable[[], float]


def describe_machine(device: str | torch.device) -> str:
    """Return the device, the processor's cores, the main memory and the operating system in words.

    A GPU is described with its memory and CUDA's version. The name of the machine is left out.
    """
    parts = [describe_device(device)]
    if torch.device(device).type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        parts += [f"{memory / 1e9:.0f} GB", f"CUDA {torch.version.cuda}", describe_device("cpu")]
    if hasattr(os, "sysconf"):
        parts.append(f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB of main memory")
    parts += [f"{os.cpu_count()} cores", f"{platform.system()} {platform.release()} {platform.machine()}"]
    return ", ".join(parts)


def power_meter(device: str | torch.device) -> PowerMeter | None:
    """Return a function that reads the power of a GPU in watts; None if the device does not tell its power.

    PyTorch reads it by NVML, for which the package nvidia-ml-py must be installed (the extra `energy`).
    """
    if torch.device(device).type != "cuda":
        return None

    def read() -> float:
        return torch.cuda.power_draw(device) / 1e3

    try:
        read()
    # NVML's errors have no common class without nvidia-ml-py, which need not be installed.
    except Exception as error:
        print(f"the energy is left out: {type(error).__name__}: {error}")
        return None
    return read


def joules_per_call(
    call: Callable[[], object],
    read_watts: PowerMeter,
    seconds: float = ENERGY_SECONDS,
    settling_seconds: float = SETTLING_SECONDS,
) -> float:
    """Return the joules that a call takes: the integral of the power over many calls, divided by their number.

    Args:
        call: the function, which is repeated.
        read_watts: reads the power in watts.
        seconds: time for which the call is repeated while the power is read.
        settling_seconds: time for which the call is repeated before.
    """
    _repeat(call, settling_seconds)
    readings: list[tuple[float, float]] = []
    done = threading.Event()

    def sample() -> None:
        readings.append((time.perf_counter(), read_watts()))
        while not done.wait(SAMPLING_SECONDS):
            readings.append((time.perf_counter(), read_watts()))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    began = time.perf_counter()
    try:
        calls = _repeat(call, seconds)
    finally:
        ended = time.perf_counter()
        done.set()
        sampler.join()
    return integrate(readings, began, ended) / calls


def integrate(readings: Sequence[tuple[float, float]], began: float, ended: float) -> float:
    """Return the integral of readings (second, watts) from `began` to `ended` in joules, by the trapezoidal rule.

    The power is linear between two readings, and constant before the first and after the last reading.
    """
    times, watts = np.array(readings).T
    inside = times[(times > began) & (times < ended)]
    moments = np.concatenate([[began], inside, [ended]])
    return float(np.trapezoid(np.interp(moments, times, watts), moments))


def _repeat(call: Callable[[], object], seconds: float) -> int:
    """Call a function for this time, wait for the GPU, and return the number of calls."""
    synchronize()
    calls, began = 0, time.perf_counter()
    while not calls or time.perf_counter() - began < seconds:
        call()
        calls += 1
        # A GPU's queue is unlimited, so an unsynchronised loop would queue far more than it measures.
        synchronize()
    return calls
