"""Parameters, MACs, speed and memory of models, ours and timm's."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from models import complexity, create_model
from retinue.benchmarks.timing import Row, autocast, interleave, make_row, peak_memory_mb
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
        compile: run the models through torch.compile.
    """

    image_size: int
    batch_size: int
    device: str
    dtype: str
    channels_last: bool
    compile: bool


def build(model: Mapping[str, Any], image_size: int) -> torch.nn.Module:
    """Build a model for 1000 classes from the arguments of `models.create_model`."""
    return create_model(model, NUM_CLASSES, IN_CHANS, image_size)


def make_step(model: Mapping[str, Any], setting: Setting, train: bool) -> Callable[[], object]:
    """Return a function that runs the model once on a batch, or with `train` trains it for one step.

    Inference is a forward pass in evaluation mode; a training step is forward, cross-entropy, backward and an update by
    AdamW. Weights and images are random and lie on the device.
    """
    torch.manual_seed(0)
    net = build(model, setting.image_size).to(setting.device).train(train)
    image = torch.randn(setting.batch_size, IN_CHANS, setting.image_size, setting.image_size, device=setting.device)
    if setting.channels_last:
        net, image = net.to(memory_format=torch.channels_last), image.contiguous(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    label = torch.randint(NUM_CLASSES, (setting.batch_size,), device=setting.device)
    if setting.compile:
        net.compile()

    @torch.inference_mode()
    def infer() -> None:
        with autocast(setting.device, setting.dtype):
            net(image)

    def learn() -> None:
        with autocast(setting.device, setting.dtype):
            loss = F.cross_entropy(net(image), label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if not train:
        return infer
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
    return learn


def benchmark(
    models: Mapping[str, Mapping[str, Any]],
    setting: Setting,
    *,
    train: bool = True,
    rounds: int = 7,
    against: str | None = None,
) -> list[Row]:
    """Measure models in turn: one row for the inference of each, then one row for the training of each.

    Args:
        models: the arguments of `models.create_model` for each name in the rows.
        setting: conditions that are the same for all models.
        train: measure training, too.
        rounds: how often each model is timed.
        against: name of the model that the column `ratio` is relative to; by default that column is empty.

    Raises:
        ValueError: a model is unknown, or `against` is not among the models.
    """
    if against is not None and against not in models:
        raise ValueError(f"against={against} is not one of the models.{nearest(against, models)}")
    size = setting.image_size
    complexities = {name: complexity(partial(build, model, size), size, IN_CHANS) for name, model in models.items()}
    rows = []
    for mode in ("inference", "training") if train else ("inference",):
        makers = {name: partial(make_step, model, setting, mode == "training") for name, model in models.items()}
        memory = {name: peak_memory_mb(make, setting.device) for name, make in makers.items()}
        timings = interleave({name: make() for name, make in makers.items()}, rounds, min_seconds=0.1)
        for name, timing in timings.items():
            params, macs = complexities[name]
            row = make_row(
                name,
                timing,
                against=None if against is None else (against, timings[against]),
                shape=f"{setting.batch_size}x{IN_CHANS}x{size}x{size}",
                dtype=setting.dtype,
                device=setting.device,
                peak_mb=memory[name],
                mode=mode,
                images_per_s=setting.batch_size / timing.median,
                params_m=params / 1e6,
                macs_g=macs / 1e9,
                channels_last=str(setting.channels_last),
                compile=str(setting.compile),
            )
            rows.append(row)
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
