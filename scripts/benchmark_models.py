"""Parameters, MACs, speed and memory of models, ours and timm's, interleaved in one process so that ratios hold.

    python scripts/benchmark_models.py --models biformer_tiny swin_tiny resnet50 --batch-size 8 --against resnet50

Inference is a forward pass in evaluation mode; training is forward, cross-entropy, backward and an AdamW step. Weights
and images are random and lie on the device. `--dtype` other than float32 is autocast's. What peak memory means on a
GPU and on the CPU is said at `benchmarking.peak_memory_mb`.
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from models import complexity, create_model
from retinue.benchmarks.timing import Row, interleave, make_row, peak_memory_mb, pick_device, print_rows, write_csv
from retinue.utils.errors import user_errors
from retinue.utils.files import replacing
from retinue.utils.suggestions import nearest

NUM_CLASSES, IN_CHANS = 1000, 3


@dataclass(frozen=True)
class Setting:
    """What is the same for all models of a comparison."""

    img_size: int
    batch_size: int
    device: str
    dtype: str
    channels_last: bool
    compile: bool

    def autocast(self) -> contextlib.AbstractContextManager:
        dtype = getattr(torch, self.dtype)
        return torch.autocast(torch.device(self.device).type, dtype, enabled=dtype != torch.float32)


def build(model: Mapping[str, Any], img_size: int) -> torch.nn.Module:
    return create_model(model, NUM_CLASSES, IN_CHANS, img_size)


def make_step(model: Mapping[str, Any], setting: Setting, train: bool) -> Callable[[], object]:
    """A function that runs the model once on a batch, or trains it one step."""
    torch.manual_seed(0)
    net = build(model, setting.img_size).to(setting.device).train(train)
    image = torch.randn(setting.batch_size, IN_CHANS, setting.img_size, setting.img_size, device=setting.device)
    if setting.channels_last:
        net, image = net.to(memory_format=torch.channels_last), image.contiguous(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    label = torch.randint(NUM_CLASSES, (setting.batch_size,), device=setting.device)
    if setting.compile:
        net.compile()

    @torch.inference_mode()
    def infer() -> None:
        with setting.autocast():
            net(image)

    def learn() -> None:
        with setting.autocast():
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
    """One row for each model's inference, then one for each model's training.

    Args:
        models: the arguments of `models.create_model` by what the model is called in the rows.

    Raises:
        ValueError: a model is unknown, or `against` is not among them.
    """
    if against is not None and against not in models:
        raise ValueError(f"--against {against!r} is not one of the models.{nearest(against, models)}")
    size = setting.img_size
    sizes = {name: complexity(partial(build, model, size), size, IN_CHANS) for name, model in models.items()}
    rows = []
    for mode in ("inference", "training") if train else ("inference",):
        makers = {name: partial(make_step, model, setting, mode == "training") for name, model in models.items()}
        memory = {name: peak_memory_mb(make, setting.device) for name, make in makers.items()}
        timings = interleave({name: make() for name, make in makers.items()}, rounds, min_seconds=0.1)
        rows += [
            make_row(
                name,
                timing,
                against=(against, timings[against]) if against else None,
                shape=f"{setting.batch_size}x{IN_CHANS}x{setting.img_size}x{setting.img_size}",
                dtype=setting.dtype,
                device=setting.device,
                peak_mb=memory[name],
                mode=mode,
                images_per_s=setting.batch_size / timing.median,
                params_m=sizes[name][0] / 1e6,
                macs_g=sizes[name][1] / 1e9,
                channels_last=str(setting.channels_last),
                compile=str(setting.compile),
            )
            for name, timing in timings.items()
        ]
    return rows


def plot(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Images/s against MACs, a labelled point for each model, a panel for each mode."""
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
            at = (row["macs_g"], row["images_per_s"])
            axes.annotate(label, at, textcoords="offset points", fontsize="small", **side)
        axes.set(title=mode, xlabel="GMACs", ylabel="images/s", xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.margins(0.15)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, {rows[0]['shape']}", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Compare models in size, speed and memory.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["biformer_tiny", "swin_tiny", "resnet50"], metavar="NAME")
    parser.add_argument("--against", metavar="NAME", help="the model that the column `ratio` gives the speed over")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--train", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    device = str(pick_device(args.device))
    setting = Setting(args.img_size, args.batch_size, device, args.dtype, args.channels_last, args.compile)
    models = {name: {"name": name} for name in args.models}
    rows = benchmark(models, setting, train=args.train, rounds=args.rounds, against=args.against)
    print_rows(rows)
    if args.csv:
        write_csv(args.csv, rows)
    if args.plot:
        plot(args.plot, rows)


if __name__ == "__main__":
    with user_errors():
        main()
