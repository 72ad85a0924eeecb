"""Attention against named peers: the primitives in the layers of nets, whole ops, and whole nets.

    python scripts/benchmark_ops.py                                           # what there is, as fits the machine
    python scripts/benchmark_ops.py ops=[window,bilevel_routing,agent] resolution=[224,512,1024]
    python scripts/benchmark_ops.py ops=routed_attention resolution=[800x1333] dtype=float16 csv=ops.csv plot=ops.png
    python scripts/benchmark_ops.py ops=[] models=[biformer_small,swin_tiny]
    python scripts/benchmark_ops.py tune=true ops=window_attention            # block sizes of the Triton kernels

A primitive (routed_attention, window_attention, neighborhood_attention) is measured in the layers of BiFormer-S, Swin-T
and NAT-M, and summed over them; an op as the second block of a first stage of 64 channels; a net at 224 pixels with the
attention of its ops replaced. All that stand in one table take turns, forward and forward + backward. `ratio` is the
speed over that of `against`. `error` is how many times the error of plain PyTorch in the same type the worst of output
and gradients has, against float64: no figure of ours is printed where that is more than 2, none of a peer where it is
more than 4. On a GPU, `floor` is the share of the time in which the device, at the rates of copying and of multiplying
matrices measured in the same run, could move the fused form's bytes and do its FLOPs. Peak memory is that of GPUs, of a
primitive beyond its inputs; of nets also on the CPU. With two sizes of 512 pixels or more, time and memory are fitted
as powers of the number of tokens.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch._dynamo as dynamo
from omegaconf import OmegaConf

from ops import list_ops
from ops.neighborhood import NATTEN_INSTALLED
from retinue.benchmarks import growth, layers, nets, tuning
from retinue.benchmarks.layers import MEANT, Layer, first_line
from retinue.benchmarks.nets import Subject
from retinue.benchmarks.peers import PRIMITIVES, Pair
from retinue.benchmarks.timing import (
    Row,
    Timing,
    interleave,
    make_row,
    peak_memory_mb,
    pick_device,
    print_rows,
    write_csv,
)
from retinue.utils.errors import user_errors
from retinue.utils.suggestions import nearest

GPU_SIZES, CPU_SIZES = (224, 512, "800x1333", 1024, 2048), (224,)
GPU_NETS, CPU_NETS = ("biformer_small", "swin_tiny", "nat_mini"), ("biformer_tiny",)
DIRECTIONS = {False: "forward", True: "forward + backward"}
HIDDEN = ("series", "batch", "pixels")  # columns of the CSV only


@dataclass
class Options:
    """What the command line takes, as key=value; what is None follows from the device and from what is asked for."""

    ops: Any = None  # primitives and ops: one or a list
    models: Any = None  # nets
    resolution: Any = None  # of images: 224, 800x1333 or a list
    batch: int | None = None
    dtype: str | None = None
    device: str = "auto"
    rounds: int | None = None
    threads: int = 2  # of the CPU
    tune: bool = False
    csv: str | None = None
    plot: str | None = None


@dataclass(frozen=True)
class Setting:
    device: torch.device
    dtype: str
    rounds: int
    rates: tuple[float, float] | None = None  # bytes/s and FLOP/s of a GPU; on the CPU, caches hold most maps

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def floor(self, moved: float, flops: float) -> float | None:
        """Seconds in which the device can move so many bytes and do so many FLOPs."""
        return max(moved / self.rates[0], flops / self.rates[1]) if self.rates else None


class Figures(NamedTuple):
    timing: Timing
    peak: float | None  # MB
    error: float | None  # of plain PyTorch's
    floor: float | None  # seconds


Found = dict[tuple[str, bool], Figures]  # by formulation and whether backward is included


def parse(arguments: Sequence[str]) -> Options:
    """Raises:
    ValueError: an argument is unknown or has a wrong value.
    """
    known = Options.__dataclass_fields__
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals or key not in known:
            near = nearest(key.lstrip("-"), known)
            raise ValueError(f"no argument {argument!r}.{near} There are, as key=value: {', '.join(known)}")
    given = OmegaConf.from_cli(list(arguments))
    options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), given))
    assert isinstance(options, Options)
    for key in ("batch", "rounds", "threads"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise ValueError(f"{key} must be at least 1, not {value}")
    if options.dtype not in (None, "float32", "float16", "bfloat16"):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, not {options.dtype!r}")
    return options


def as_list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def image_size(value: Any) -> Pair:
    """(H, W) of 224 or "800x1333"."""
    sides = str(value).split("x")
    if not (1 <= len(sides) <= 2 and all(side.isdecimal() and int(side) >= 32 for side in sides)):
        raise ValueError(f"resolution is of numbers such as 224 or 800x1333, at least 32, not {value!r}")
    return (int(sides[0]), int(sides[-1]))


def measure(
    steps: Mapping[str, Callable[[], object]], setting: Setting, optional: Sequence[str] = (), on_gpu: bool = False
) -> dict[str, Timing]:
    """Timings of the steps that can run; `optional` ones may fail in any way, others by lack of memory."""
    able = {}
    for name, step in steps.items():
        try:
            step()
            able[name] = step
        except Exception as error:
            if name not in optional and not isinstance(error, torch.OutOfMemoryError):
                raise
            print(f"{name or 'ours'} is left out: {first_line(error)}")
    return interleave(able, setting.rounds, warmup=1, on_gpu=on_gpu)


def bench_layer(layer: Layer, batch: int, setting: Setting, compiling: bool) -> Found:
    """Raises:
    ValueError: ours is not exact enough.
    """
    torch.compiler.reset()  # or each layer would add to what is compiled
    call, of, names = layer.call(batch, setting.device), PRIMITIVES[layer.primitive], []
    for name, formulation in of.items():
        if (reason := formulation.obstacle(call)) is None and (compiling or name != nets.COMPILED):
            names.append(name)
        elif reason and setting.is_cuda:
            print(f"{name} is left out of {layer.describe(batch)}: {reason}")
    inputs = layers.make_inputs(layer, batch, getattr(torch, setting.dtype), setting.device)
    errors = layers.check(layer, names, inputs)
    names = exact_enough(errors, layer.describe(batch))
    found = {}
    for train in DIRECTIONS:
        steps = {name: layers.make_step(layer, name, inputs, train) for name in names}
        timings = measure(steps, setting, [name for name in names if of[name].foreign], setting.is_cuda)
        floor = setting.floor(*layer.floor(batch, inputs.qkv.element_size(), train))
        for name, timing in timings.items():
            peak = peak_memory_mb(partial(steps.__getitem__, name), setting.device) if setting.is_cuda else None
            found[name, train] = Figures(timing, peak, errors[name], floor)
    return found


def exact_enough(errors: Mapping[str, float], what: str) -> list[str]:
    for name, error in errors.items():
        if not error <= MEANT:
            print(f"{name} is left out of {what}: it errs {error:.3g} times as much as plain PyTorch")
    return [name for name, error in errors.items() if error <= MEANT]


def total(founds: Sequence[tuple[Layer, Found]]) -> Found:
    """Of all layers, of the formulations that ran in each of them; peak memory and error are the greatest."""
    summed = {}
    for key in founds[0][1]:
        parts = [(layer.count, found[key]) for layer, found in founds if key in found]
        if len(parts) == len(founds):
            peaks = [part.peak for _, part in parts if part.peak is not None]
            summed[key] = Figures(
                Timing.sum([(count, part.timing) for count, part in parts]),
                max(peaks, default=None),
                max(part.error or 0.0 for _, part in parts),
                sum(count * part.floor for count, part in parts if part.floor) or None,
            )
    return summed


def bench_subject(subject: Subject, setting: Setting, compiling: bool) -> Found:
    """Raises:
    ValueError: ours is not exact enough.
    """
    torch.compiler.reset()
    names = subject.formulations()
    optional = [nets.COMPILED, *(name for of in PRIMITIVES.values() for name, f in of.items() if f.foreign)]
    if len(names) > 1 and subject.is_op and setting.is_cuda and compiling:
        names.append(nets.COMPILED)
    errors: Mapping[str, float] = {}
    if len(names) > 1:  # otherwise it is itself the plain form
        errors = nets.check(subject, names, optional)
        names = exact_enough(errors, subject.name)
    found = {}
    for train in DIRECTIONS:
        makers = {name: partial(nets.make_step, subject, name, train) for name in names}
        timings = measure(
            {name: make() for name, make in makers.items()}, setting, optional, subject.is_op and setting.is_cuda
        )
        floor = setting.floor(*subject.floor(train)) if subject.is_op and setting.is_cuda else None
        for name, timing in timings.items():
            measured = setting.is_cuda or not subject.is_op
            peak = peak_memory_mb(makers[name], setting.device) if measured else None
            found[name, train] = Figures(timing, peak, errors.get(name), floor)
    return found


def make_rows(
    found: Found, setting: Setting, shape: str, series: str, batch: int, pixels: int, name: str = ""
) -> list[Row]:
    """The rows of what was measured together; others are told over the second, where there is one."""
    rows, names = [], list(dict.fromkeys(key[0] for key in found))
    over = names[1] if len(names) > 1 else None
    for (formulation, train), figures in found.items():
        other = found.get((over, train)) if over and over != formulation else None
        title = ", ".join(filter(None, (name, formulation)))
        row = make_row(
            title,
            figures.timing,
            against=(over, other.timing) if over and other else None,
            shape=shape,
            dtype=setting.dtype,
            device=setting.device,
            peak_mb=figures.peak,
            direction=DIRECTIONS[train],
            floor=figures.floor / figures.timing.median if figures.floor else None,
            error=figures.error,
            images_per_s=batch / figures.timing.median if timm.is_model(name) else None,
            series=series,
            batch=batch,
            pixels=pixels,
        )
        rows.append(row)
    return rows


def bench_primitive(
    primitive: str, resolution: Pair, batch: int, setting: Setting, compiling: bool
) -> tuple[list[Row], list[Row]]:
    """A row for each layer, formulation and direction, and one for their sums over a net's layers."""
    rows, sums, variants, pixels = [], [], {}, resolution[0] * resolution[1]
    for layer in layers.layers(primitive, resolution, unbiased=NATTEN_INSTALLED):
        try:
            found = bench_layer(layer, batch, setting, compiling)
        except torch.OutOfMemoryError:
            print(f"{layer.describe(batch)} is left out: out of memory")
            found = {}
        variants.setdefault(layer.variant, []).append((layer, found))
        rows += make_rows(found, setting, layer.describe(batch), layer.series, batch, pixels)
    for variant, founds in variants.items():
        if not all(found for _, found in founds):
            continue
        series = ", ".join(filter(None, (f"{primitive}, all layers of {founds[0][0].net}", variant)))
        shape = f"{batch} x {sum(layer.count for layer, _ in founds)} layers" + f", {variant}" * bool(variant)
        sums += make_rows(total(founds), setting, shape, series, batch, pixels)
    return rows, sums


@dataclass(frozen=True)
class Plan:
    """What is measured, in this order."""

    nets: list[str]
    net_batch: int
    primitives: list[str]
    ops: list[str]
    batches: dict[Pair, int]  # by the images' size
    compile_ops: bool  # of all ops, it would take hours


def plan(options: Options, cuda: bool) -> Plan:
    """Raises:
    ValueError: there is no such op, net or size.
    """
    everything = options.ops is None and options.models is None
    known = [*PRIMITIVES, *list_ops()]
    ops = as_list(known if everything or (options.tune and options.ops is None) else options.ops or [])
    nets = as_list((GPU_NETS if cuda else CPU_NETS) if everything else options.models or [])
    for name in ops:
        if name not in known:
            raise ValueError(f"there is no op {name!r}.{nearest(str(name), known)} There are: {', '.join(known)}")
    for name in nets:
        if not timm.is_model(name):
            raise ValueError(f"there is no net {name!r}.{nearest(str(name), timm.list_models())}")
    sizes = [image_size(r) for r in as_list(options.resolution or (GPU_SIZES if cuda else CPU_SIZES))]
    return Plan(
        nets,
        options.batch or (128 if cuda else 8),
        [name for name in ops if name in PRIMITIVES],
        [name for name in ops if name not in PRIMITIVES],
        {size: options.batch or (1 if not cuda else 128 if max(size) <= 224 else 4) for size in sizes},
        not everything,
    )


def tables(what: Plan, setting: Setting) -> Iterator[tuple[str, list[Row]]]:
    """What was measured together, and what it is called."""
    for name in what.nets:
        subject = nets.make_subject(name, (224, 224), what.net_batch, str(setting.device), setting.dtype)
        found = bench_subject(subject, setting, compiling=False)
        rows = make_rows(found, setting, subject.describe(), name, what.net_batch, 224**2, name)
        yield f"{name}, in which only the attention differs", rows
    for i, (size, batch) in enumerate(what.batches.items()):
        images, pixels = f"images of {size[0]} x {size[1]}", size[0] * size[1]
        for primitive in what.primitives:
            of_layers, of_nets = bench_primitive(primitive, size, batch, setting, compiling=i == 0)
            yield f"{primitive}, {images}", of_layers
            yield f"{primitive}, summed over the layers of a net, {images}", of_nets
        rows = []
        for name in what.ops:
            subject = nets.make_subject(name, size, batch, str(setting.device), setting.dtype)
            try:
                found = bench_subject(subject, setting, compiling=i == 0 and what.compile_ops)
            except torch.OutOfMemoryError:
                print(f"{name} is left out of {images}: out of memory")
                continue
            rows += make_rows(found, setting, subject.describe(), "ops", batch, pixels, name)
        yield f"ops, {images}", rows


def main(argv: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    cuda = device.type == "cuda"
    what = plan(options, cuda)
    setting = Setting(
        device, options.dtype or ("bfloat16" if cuda else "float32"), options.rounds or (20 if cuda else 5)
    )
    dtype = getattr(torch, setting.dtype)
    if options.tune and not cuda:
        raise ValueError("tune=true needs a CUDA device")
    if cuda:
        dynamo.config.recompile_limit = 64  # beyond it, FlexAttention would run unfused in the many layers of a net
        bandwidth, rate = layers.device_rates(device, dtype)
        setting = replace(setting, rates=(bandwidth, rate))
        print(f"{bandwidth / 1e9:.4g} GB/s in copying, {rate / 1e12:.4g} TFLOP/s in multiplying {setting.dtype}")
    else:
        print("No CUDA device: Triton kernels, FlexAttention, NATTEN and torch.compile are left out.")
    if options.tune:
        tuning.tune_all(what.primitives, what.batches, dtype, device)
        return
    rows: list[Row] = []
    try:
        for title, table in tables(what, setting):
            if table:
                print_rows([{key: value for key, value in row.items() if key not in HIDDEN} for row in table], title)
            rows += table
    finally:  # an error does not take along what was measured before it
        if fitted := growth.exponents(rows):
            print_rows(fitted, "cost as a power of the number of tokens")
        if options.csv and rows:
            write_csv(options.csv, rows)
        if options.plot and rows:
            growth.plot(options.plot, rows)


if __name__ == "__main__":
    with user_errors():
        main()
