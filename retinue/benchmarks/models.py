"""Parameters, MACs, speed and memory of models, ours and timm's, in several forms and formulations."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from models import complexity, create_model
from ops.backend import redirecting, using
from retinue.benchmarks import nets
from retinue.benchmarks.forms import EAGER, GPU_FORMS, GRAPH, in_form, prepare
from retinue.benchmarks.formulations import PLAIN_PYTORCH
from retinue.benchmarks.numerics import first_line
from retinue.benchmarks.timing import (
    Row,
    Timing,
    autocast,
    interleave,
    kernels_of,
    make_row,
    peak_memory_mb,
    run_twice,
    used_memory_mb,
)
from retinue.utils.files import replacing
from retinue.utils.suggestions import nearest

NUM_CLASSES, IN_CHANS = 1000, 3


@dataclass(frozen=True)
class Setting:
    """Conditions under which all models of a comparison are measured.

    Attributes:
        image_size: side of the square images, in pixels.
        batch_size: images of a batch.
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32", or the type of autocast: "bfloat16" or "float16".
        channels_last: store weights and images in channels-last memory format.
    """

    image_size: int
    batch_size: int
    device: str
    dtype: str
    channels_last: bool

    @property
    def is_cuda(self) -> bool:
        """True if the device is a GPU."""
        return torch.device(self.device).type == "cuda"


def build(model: Mapping[str, Any], image_size: int) -> torch.nn.Module:
    """Build a model for 1000 classes from the arguments of `models.create_model`."""
    return create_model(model, NUM_CLASSES, IN_CHANS, image_size)


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


def make_step(
    model: Mapping[str, Any], setting: Setting, train: bool, form: str = EAGER, formulation: str = nets.OURS
) -> Callable[[], object]:
    """Return a function that runs the model once on a batch, or with `train` trains it for one step.

    Inference is a forward pass in evaluation mode; a training step is forward, cross-entropy, backward and an update by
    AdamW, fused on a GPU. Weights and images are random and lie on the device.

    Args:
        model: arguments of `models.create_model`.
        setting: conditions of the measurement.
        train: train the model.
        form: a name of `retinue.benchmarks.forms.FORMS`.
        formulation: formulation of the attention, as in `retinue.benchmarks.nets.make_step`.
    """
    torch.manual_seed(0)
    net = build(model, setting.image_size).to(setting.device).train(train)
    image = torch.randn(setting.batch_size, IN_CHANS, setting.image_size, setting.image_size, device=setting.device)
    if setting.channels_last:
        net, image = net.to(memory_format=torch.channels_last), image.contiguous(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    label = torch.randint(NUM_CLASSES, (setting.batch_size,), device=setting.device)
    prepare(net, form)
    # Casts of weights that autocast keeps would not be repeated when a graph is replayed.
    precision = partial(autocast, setting.device, setting.dtype, cache_enabled=form != GRAPH)
    backend, redirections = "torch" if formulation == PLAIN_PYTORCH else "auto", nets.redirections_to(formulation)

    @torch.no_grad()
    def infer() -> None:
        with using(backend), redirecting(redirections), precision():
            net(image)

    def learn() -> None:
        with using(backend), redirecting(redirections), precision():
            loss = F.cross_entropy(net(image), label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if not train:
        return in_form(infer, form)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=1e-5, fused=setting.is_cuda, capturable=setting.is_cuda and form == GRAPH
    )
    return in_form(learn, form)


@dataclass(frozen=True)
class Measured:
    """Figures of one model in one form.

    Attributes:
        timing: its time per batch.
        peak_mb: its peak memory in MB (10^6 bytes).
        ready_s: seconds until it had run twice, with building and compiling.
    """

    timing: Timing
    peak_mb: float
    ready_s: float


def measure(
    makers: Mapping[str, Callable[[], Callable[[], object]]], setting: Setting, rounds: int
) -> dict[str, Measured]:
    """Build, prepare and time models in turn; a model that cannot run on a GPU is left out with a message."""
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
    return {name: Measured(timing, memory[name], ready[name]) for name, timing in timings.items()}


def benchmark(
    models: Mapping[str, Mapping[str, Any]],
    setting: Setting,
    *,
    train: bool = True,
    rounds: int = 7,
    against: str | None = None,
    forms: Sequence[str] = (EAGER,),
    formulations: Mapping[str, str] | None = None,
) -> list[Row]:
    """Measure models in turn, in each mode and form: rows for inference, then rows for training.

    Args:
        models: the arguments of `models.create_model` for each name in the rows.
        setting: conditions that are the same for all models.
        train: measure training, too.
        rounds: how often each model is timed.
        against: name of the model that the column `ratio` is relative to, in the same form; by default that column is
            empty.
        forms: names of `retinue.benchmarks.forms.FORMS`.
        formulations: formulations of the attention by name in the rows; by default ours.

    Raises:
        ValueError: a model is unknown, `against` is not among the models, or a form needs a GPU.
    """
    if against is not None and against not in models:
        raise ValueError(f"against={against} is not one of the models.{nearest(against, models)}")
    for form in forms:
        if form in GPU_FORMS and not setting.is_cuda:
            raise ValueError(f"the form {form} needs a CUDA device, not {setting.device}")
    size = setting.image_size
    complexities = {name: complexity(partial(build, model, size), size, IN_CHANS) for name, model in models.items()}
    rows = []
    for mode in ("inference", "training") if train else ("inference",):
        for form in forms:
            torch.compiler.reset()
            gc.collect()
            makers = {
                name: partial(make_step, model, setting, mode == "training", form, (formulations or {}).get(name, ""))
                for name, model in models.items()
            }
            measured = measure(makers, setting, rounds)
            baseline = None if against not in measured else (against, measured[against].timing)
            for name, figures in measured.items():
                params, macs = complexities[name]
                row = make_row(
                    name,
                    figures.timing,
                    against=baseline,
                    shape=f"{setting.batch_size}x{IN_CHANS}x{size}x{size}",
                    dtype=setting.dtype,
                    device=setting.device,
                    peak_mb=figures.peak_mb,
                    mode=mode,
                    form=form,
                    images_per_s=setting.batch_size / figures.timing.median,
                    ready_s=figures.ready_s,
                    params_m=params / 1e6,
                    macs_g=macs / 1e9,
                    channels_last=str(setting.channels_last),
                )
                rows.append(row)
    return rows


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
