"""One model at a time: throughput against the batch size, latency of single images, and parts of a training step."""

import gc
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from retinue.benchmarks.forms import EAGER, GPU_FORMS
from retinue.benchmarks.machine import joules_per_call, power_meter
from retinue.benchmarks.model_steps import Setting, make_parts, make_step
from retinue.benchmarks.models import check_forms, complexities, make_model_row
from retinue.benchmarks.numerics import first_line
from retinue.benchmarks.timing import Row, Timing, interleave, run_twice, synchronize, used_memory_mb

# Values of the column `mode`.
LATENCY, PARTS = "latency", ("forward", "backward", "optimizer")
THROUGHPUT = {False: "throughput", True: "training throughput"}
# A 99th percentile takes hundreds of calls; a slow model is called at least `MIN_CALLS` times, for some seconds.
MAX_CALLS, MIN_CALLS, CALLS_SECONDS = 500, 20, 5.0


def measure_alone(
    models: Mapping[str, Mapping[str, Any]],
    setting: Setting,
    *,
    batch_sizes: Sequence[int] = (),
    latency: bool = False,
    parts: bool = False,
    train: bool = True,
    energy: bool = False,
    rounds: int = 7,
    forms: Sequence[str] = (EAGER,),
    formulations: Mapping[str, str] | None = None,
    may_fail: Collection[str] = (),
) -> list[Row]:
    """Measure each model by itself; a model that cannot run on a GPU is left out with a message.

    Args:
        models: the arguments of `models.create_model` for each name in the rows.
        setting: conditions of the measurement; its batch size is that of `parts`.
        batch_sizes: batch sizes of the rows of throughput.
        latency: time single images.
        parts: time forward, backward and optimiser apart, in forms that are not one CUDA graph.
        train: measure the throughput of training, too.
        energy: measure the joules of an image in the rows of throughput, if the GPU tells its power.
        rounds: how often a throughput is timed.
        forms: names of `retinue.benchmarks.forms.FORMS`.
        formulations: formulations of the attention by name in the rows; by default ours.
        may_fail: names that are left out if the model does not take the image size.

    Raises:
        ValueError: a model is unknown, or a form needs a GPU.
    """
    check_forms(forms, setting)
    rows: list[Row] = []
    for name, counted in complexities(models, setting.image_size, may_fail).items():
        for form in forms:
            formulation = (formulations or {}).get(name, "")

            def make(setting: Setting, train: bool, name: str = name, form: str = form, how: str = formulation) -> Any:
                return make_step(models[name], setting, train, form, how)

            row = partial(make_model_row, name, counted=counted, form=form)
            try:
                for training in (False, True) if train and batch_sizes else (False,):
                    of_size = partial(make, train=training)
                    for size, figures in throughput(name, of_size, setting, batch_sizes, rounds, energy):
                        rows.append(row(setting=size, mode=THROUGHPUT[training], **figures))
                if latency:
                    rows.append(row(**latency_figures(partial(make, train=False), setting), mode=LATENCY))
                if parts and form not in GPU_FORMS:
                    for part, timing in time_parts(models[name], setting, form, formulation).items():
                        rows.append(row(timing=timing, setting=setting, mode=part))
            except Exception as error:
                if not setting.is_cuda:
                    raise
                print(f"{name}, {form} is left out: {first_line(error)}")
            free_memory()
    return rows


def throughput(
    name: str,
    make: Callable[[Setting], Callable[[], object]],
    setting: Setting,
    batch_sizes: Sequence[int],
    rounds: int,
    energy: bool = False,
) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Yield the setting and the figures of each batch size, from the smallest.

    A batch size that does not fit in memory is halved until it fits or was measured before; no larger one is tried.

    Args:
        name: name of the model, for messages.
        make: builds the step of a setting.
        setting: conditions of the measurement; its batch size is not used.
        batch_sizes: batch sizes to measure.
        rounds: how often each one is timed.
        energy: measure the joules of an image.
    """
    read_watts = power_meter(setting.device) if energy and batch_sizes else None
    done: set[int] = set()
    for asked in sorted(set(batch_sizes)):
        batch = asked
        while batch and batch not in done:
            size = replace(setting, batch_size=batch)
            figures, halve = None, False
            try:
                step, peak_mb = prepare_step(partial(make, size), size)
                timing = interleave({name: step}, rounds, min_seconds=0.1)[name]
                joules = joules_per_call(step, read_watts) / batch if read_watts else None
                figures = {"timing": timing, "peak_mb": peak_mb, "joules_per_image": joules}
            except Exception as error:
                # Some models cannot be trained by a single image, since BN has one value per channel.
                fault = "does not fit in memory" if is_out_of_memory(error) else f"is left out: {first_line(error)}"
                print(f"{name}: a batch of {batch} {fault}")
                halve = is_out_of_memory(error)
            # The step holds the model, and the error's traceback has held its activations until here.
            step = None
            free_memory()
            if figures is not None:
                done.add(batch)
                yield size, figures
            if not halve:
                break
            batch //= 2
        if batch < asked:
            return


def prepare_step(make: Callable[[], Callable[[], object]], setting: Setting) -> tuple[Callable[[], object], Any]:
    """Build a step and run it twice; return the step, and its peak memory in MB on a GPU or None on the CPU."""
    if setting.is_cuda:
        return used_memory_mb(make, setting.device)
    step = make()
    run_twice(step)
    return step, None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the memory of the GPU or of the machine is too small."""
    # On the CPU, PyTorch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def latency_figures(make: Callable[[Setting], Callable[[], object]], setting: Setting) -> dict[str, Any]:
    """Time single images one after another: the median is in the row's `median_ms`, and `p99_ms` is besides.

    Each image is waited for before the next one begins.
    """
    single = replace(setting, batch_size=1)
    step, peak_mb = prepare_step(partial(make, single), single)
    timing = time_calls(step)
    return {"timing": timing, "setting": single, "peak_mb": peak_mb, "p99_ms": 1e3 * np.percentile(timing.seconds, 99)}


def time_calls(call: Callable[[], object], max_calls: int = MAX_CALLS, seconds: float = CALLS_SECONDS) -> Timing:
    """Return the time of each of many calls."""
    samples: list[float] = []
    began = time.perf_counter()
    while len(samples) < MIN_CALLS or (len(samples) < max_calls and time.perf_counter() - began < seconds):
        start = time.perf_counter()
        call()
        synchronize()
        samples.append(time.perf_counter() - start)
    return Timing(tuple(samples))


def time_parts(model: Mapping[str, Any], setting: Setting, form: str, formulation: str) -> dict[str, Timing]:
    """Time forward, backward and optimiser of a training step; the GPU is waited for after each part."""
    parts = make_parts(model, setting, form, formulation)
    samples: list[tuple[float, ...]] = []
    began = time.perf_counter()
    # The first steps choose kernels and make the optimiser's state.
    for call in range(2 + MAX_CALLS):
        synchronize()
        moments = [time.perf_counter()]
        loss = parts.forward()
        synchronize()
        moments.append(time.perf_counter())
        parts.backward(loss)
        synchronize()
        moments.append(time.perf_counter())
        parts.update()
        synchronize()
        moments.append(time.perf_counter())
        if call >= 2:
            samples.append(tuple(np.diff(moments).tolist()))
        if len(samples) >= 5 and time.perf_counter() - began > CALLS_SECONDS / 2:
            break
    return {part: Timing(column) for part, column in zip(PARTS, zip(*samples, strict=True), strict=True)}


def free_memory() -> None:
    """Give back the memory of models that are no longer used."""
    # Resetting the compiler would import it.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
