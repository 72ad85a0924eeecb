"""Parameters, MACs, speed and memory of models, ours and timm's, in several forms and formulations."""

import gc
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

from models import complexity
from retinue.benchmarks import nets
from retinue.benchmarks.forms import EAGER, GPU_FORMS
from retinue.benchmarks.machine import PowerMeter, describe_machine, joules_per_call, power_meter
from retinue.benchmarks.model_steps import IN_CHANS, Setting, build, make_step
from retinue.benchmarks.numerics import first_line
from retinue.benchmarks.timing import (
    Row,
    Timing,
    interleave,
    kernels_of,
    make_row,
    peak_memory_mb,
    run_twice,
    used_memory_mb,
)
from retinue.utils.files import replacing
from retinue.utils.suggestions import nearest

# Largest number of models that are held in memory and timed in turn, besides the baseline.
MAX_IN_TURN = 8


def with_peers(names: Sequence[str], setting: Setting) -> dict[str, tuple[str, str]]:
    """Return the name and the formulation of each model and of its peers, by the name of the row.

    The peers of a net of ours are the same net with the attention computed as others do, and timm's net if timm has it.
    """
    size = setting.image_size
    candidates = {}
    for name in names:
        candidates[name] = (name, nets.OURS)
        subject = nets.make_subject(name, (size, size), setting.batch_size, setting.device, setting.dtype)
        for formulation in subject.formulations()[1:]:
            if formulation == nets.TIMM:
                candidates[nets.TIMM_NETS[name]] = (nets.TIMM_NETS[name], nets.OURS)
            else:
                candidates[f"{name}, {formulation}"] = (name, formulation)
    return candidates


@dataclass(frozen=True)
class Measured:
    """Figures of one model in one form.

    Attributes:
        timing: its time per batch.
        peak_mb: its peak memory in MB (10^6 bytes).
        ready_s: seconds until it had run twice, with building and compiling.
        joules: energy of a batch; None if it was not measured.
    """

    timing: Timing
    peak_mb: float
    ready_s: float
    joules: float | None = None


def measure(
    makers: Mapping[str, Callable[[], Callable[[], object]]],
    setting: Setting,
    rounds: int,
    read_watts: PowerMeter | None = None,
) -> dict[str, Measured]:
    """Build, prepare and time models in turn; a model that cannot run on a GPU is left out with a message.

    Args:
        makers: functions that build and return a step, by name.
        setting: conditions of the measurement.
        rounds: how often each model is timed.
        read_watts: reads the GPU's power; without it, no energy is measured.
    """
    steps, memory, ready = {}, {}, {}
    for name, make in makers.items():
        began = time.monotonic()
        try:
            if setting.is_cuda:
                steps[name], memory[name] = used_memory_mb(make, setting.device)
            else:
                memory[name] = peak_memory_mb(make, setting.device)
                began = time.monotonic()
                steps[name] = make()
                run_twice(steps[name])
        except Exception as error:
            if not setting.is_cuda:
                raise
            print(f"{name} is left out: {first_line(error)}")
            continue
        ready[name] = time.monotonic() - began
    timings = interleave(steps, rounds, min_seconds=0.1)
    joules = {name: joules_per_call(step, read_watts) for name, step in steps.items()} if read_watts else {}
    return {name: Measured(timing, memory[name], ready[name], joules.get(name)) for name, timing in timings.items()}


def expand(patterns: Sequence[str]) -> list[str]:
    """Return the names of models, ours and timm's, with every pattern such as `swin_*` replaced by what it matches.

    Raises:
        ValueError: no model matches a pattern.
    """
    names: dict[str, None] = {}
    for pattern in patterns:
        matches = timm.list_models(pattern) if is_pattern(pattern) else [pattern]
        if not matches:
            raise ValueError(f"no model matches {pattern}.{nearest(pattern.strip('*'), timm.list_models())}")
        names |= dict.fromkeys(matches)
    return list(names)


def is_pattern(name: str) -> bool:
    """Tell whether a name has wildcards."""
    return any(character in name for character in "*?[")


def complexities(
    models: Mapping[str, Mapping[str, Any]], image_size: int, may_fail: Collection[str] = ()
) -> dict[str, tuple[int, int]]:
    """Return parameters and MACs of each model.

    Args:
        models: the arguments of `models.create_model` for each name.
        image_size: side of the images in pixels.
        may_fail: names that are left out with a message if the model cannot be built or run with this image size.
    """
    counted = {}
    for name, model in models.items():
        try:
            counted[name] = complexity(partial(build, model, image_size), image_size, IN_CHANS)
        except Exception as error:
            if name not in may_fail:
                raise
            print(f"{name} is left out: {first_line(error)}")
    return counted


def make_model_row(
    name: str,
    timing: Timing,
    setting: Setting,
    counted: tuple[int, int],
    *,
    mode: str,
    form: str,
    against: tuple[str, Timing] | None = None,
    peak_mb: float | None = None,
    **extra: float | None,
) -> Row:
    """Return the row of one model: speed, memory, size, and the machine.

    Args:
        name: name in the row.
        timing: time per batch.
        setting: conditions of the measurement.
        counted: parameters and MACs.
        mode: what was timed, such as "inference".
        form: a name of `retinue.benchmarks.forms.FORMS`.
        against: name and timing of the baseline.
        peak_mb: peak memory in MB (10^6 bytes).
        extra: further columns.
    """
    size, (params, macs) = setting.image_size, counted
    return make_row(
        name,
        timing,
        against=against,
        shape=f"{setting.batch_size}x{IN_CHANS}x{size}x{size}",
        dtype=setting.dtype,
        device=setting.device,
        peak_mb=peak_mb,
        mode=mode,
        form=form,
        batch_size=setting.batch_size,
        images_per_s=setting.batch_size / timing.median,
        **extra,
        params_m=params / 1e6,
        macs_g=macs / 1e9,
        channels_last=str(setting.channels_last),
        machine=describe_machine(setting.device),
    )


def benchmark(
    models: Mapping[str, Mapping[str, Any]],
    setting: Setting,
    *,
    train: bool = True,
    rounds: int = 7,
    against: str | None = None,
    forms: Sequence[str] = (EAGER,),
    formulations: Mapping[str, str] | None = None,
    may_fail: Collection[str] = (),
    energy: bool = False,
) -> list[Row]:
    """Measure models in turn, in each mode and form: rows for inference, then rows for training.

    More than `MAX_IN_TURN` models are measured in groups, each with the baseline.

    Args:
        models: the arguments of `models.create_model` for each name in the rows.
        setting: conditions that are the same for all models.
        train: measure training, too.
        rounds: how often each model is timed.
        against: name of the model that the column `ratio` is relative to, in the same form; by default that column is
            empty.
        forms: names of `retinue.benchmarks.forms.FORMS`.
        formulations: formulations of the attention by name in the rows; by default ours.
        may_fail: names that are left out if the model does not take the image size.
        energy: measure the joules of an image, if the GPU tells its power.

    Raises:
        ValueError: a model is unknown, `against` is not among the models, or a form needs a GPU.
    """
    if against is not None and against not in models:
        raise ValueError(f"against={against} is not one of the models.{nearest(against, models)}")
    check_forms(forms, setting)
    counted = complexities(models, setting.image_size, may_fail)
    read_watts = power_meter(setting.device) if energy else None
    rows = []
    for mode in ("inference", "training") if train else ("inference",):
        for form in forms:
            makers = {
                name: partial(
                    make_step, models[name], setting, mode == "training", form, (formulations or {}).get(name, "")
                )
                for name in counted
            }
            done: set[str] = set()
            for names in groups(list(makers), against):
                torch.compiler.reset()
                gc.collect()
                measured = measure({name: makers[name] for name in names}, setting, rounds, read_watts)
                baseline = None if against not in measured else (against, measured[against].timing)
                for name, figures in measured.items():
                    if name in done:
                        continue
                    done.add(name)
                    row = make_model_row(
                        name,
                        figures.timing,
                        setting,
                        counted[name],
                        mode=mode,
                        form=form,
                        against=baseline,
                        peak_mb=figures.peak_mb,
                        joules_per_image=None if figures.joules is None else figures.joules / setting.batch_size,
                        ready_s=figures.ready_s,
                    )
                    rows.append(row)
    return rows


def check_forms(forms: Sequence[str], setting: Setting) -> None:
    """Raise a ValueError if one of the forms needs a GPU and the setting has none."""
    for form in forms:
        if form in GPU_FORMS and not setting.is_cuda:
            raise ValueError(f"the form {form} needs a CUDA device, not {setting.device}")


def groups(names: Sequence[str], against: str | None) -> Iterator[list[str]]:
    """Yield the names in groups of at most `MAX_IN_TURN`, each with the baseline `against` besides."""
    others = [name for name in names if name != against]
    for start in range(0, max(1, len(others)), MAX_IN_TURN):
        chosen = {*others[start : start + MAX_IN_TURN], against}
        yield [name for name in names if name in chosen]


def count_kernels(models: Mapping[str, tuple[str, str]], setting: Setting, forms: Sequence[str]) -> list[Row]:
    """Count the kernels of a training step on a GPU, and add up their milliseconds, for each model and form.

    Args:
        models: timm's name and the formulation of the attention for each name in the rows.
        setting: conditions of the measurement.
        forms: names of `retinue.benchmarks.forms.FORMS`.
    """
    rows: list[Row] = []
    for what, (name, formulation) in models.items():
        for form in forms:
            torch.compiler.reset()
            step = make_step({"name": name}, setting, True, form, formulation)
            run_twice(step)
            count, seconds = kernels_of(step)
            rows.append({"what": what, "form": form, "mode": "training", "kernels": count, "kernels_ms": 1e3 * seconds})
    return rows


def plot(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Plot images/s against MACs: a labelled point for each model, a panel for each mode."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure = Figure((6 * len(modes), 4.5), dpi=150, layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False).flat, modes, strict=True):
        points = [row for row in rows if row["mode"] == mode]
        middle = statistics.geometric_mean([row["macs_g"] for row in points])
        for row in points:
            axes.scatter(row["macs_g"], row["images_per_s"], color="#0072b2")
            side = {"xytext": (-5, 5), "ha": "right"} if row["macs_g"] > middle else {"xytext": (5, 5)}
            label = f"{row['what']} ({row['params_m']:.1f} M)"
            point = (row["macs_g"], row["images_per_s"])
            axes.annotate(label, point, textcoords="offset points", fontsize="small", **side)
        axes.set(title=mode, xlabel="GMACs", ylabel="images/s", xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.margins(0.15)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, {rows[0]['shape']}", fontsize="small")
    with replacing(path) as temporary_path:
        figure.savefig(temporary_path)
