"""Measuring attention: primitives in the layers of nets, whole ops, and whole nets."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import timm
import torch
import torch._dynamo as dynamo

from ops import list_ops
from retinue.benchmarks import layers, nets, primitives
from retinue.benchmarks.formulations import FORMULATIONS, TORCH_COMPILE
from retinue.benchmarks.layers import Layer, comma_separated
from retinue.benchmarks.nets import Subject
from retinue.benchmarks.numerics import exact_enough, first_line
from retinue.benchmarks.options import Pair
from retinue.benchmarks.primitives import PRIMITIVES
from retinue.benchmarks.timing import Row, Timing, device_rates, interleave, make_row, peak_memory_mb
from retinue.utils.suggestions import nearest

GPU_IMAGE_SIZES, CPU_IMAGE_SIZES = ((224, 224), (512, 512), (800, 1333), (1024, 1024), (2048, 2048)), ((224, 224),)
GPU_NETS, CPU_NETS = ("biformer_small", "swin_tiny", "nat_mini"), ("biformer_tiny",)
NET_IMAGE_SIZE = (224, 224)
# Names of the directions by whether the backward pass is included.
DIRECTIONS = {False: "forward", True: "forward + backward"}


@dataclass(frozen=True)
class MeasuringSetting:
    """Conditions under which all attention is measured.

    Attributes:
        device: device of the computation.
        dtype: "float32", "bfloat16" or "float16".
        rounds: how often each formulation is timed.
        rates: bytes/s and FLOP/s of a GPU. None on the CPU, whose caches hold most maps.
        external: measure compilers and libraries of others, too; some of them compile for each layer.
    """

    device: torch.device
    dtype: str
    rounds: int
    rates: tuple[float, float] | None = None
    external: bool = True

    @property
    def is_cuda(self) -> bool:
        """True if the device is a GPU."""
        return self.device.type == "cuda"

    def floor(self, moved_bytes: float, flops: float) -> float | None:
        """Return the seconds that a GPU needs at least to move so many bytes and do so many FLOPs; None on the CPU."""
        return max(moved_bytes / self.rates[0], flops / self.rates[1]) if self.rates else None


def make_setting(device: torch.device, dtype: str | None, rounds: int | None) -> MeasuringSetting:
    """Return the setting for a device; on a GPU, measure and print its rates first.

    Args:
        device: device of the computation.
        dtype: type of the computation; by default bfloat16 on a GPU, float32 on the CPU.
        rounds: how often each formulation is timed; by default 20 times on a GPU, 5 times on the CPU.
    """
    cuda = device.type == "cuda"
    if dtype is None:
        dtype = "bfloat16" if cuda else "float32"
    if rounds is None:
        rounds = 20 if cuda else 5
    if not cuda:
        print("No CUDA device: Triton kernels, FlexAttention, NATTEN and torch.compile are left out.")
        return MeasuringSetting(device, dtype, rounds)
    # With the default limit, FlexAttention would run unfused in the many layers of a net.
    dynamo.config.recompile_limit = 64
    rates = device_rates(device, getattr(torch, dtype))
    print(f"{rates[0] / 1e9:.4g} GB/s in copying, {rates[1] / 1e12:.4g} TFLOP/s in multiplying {dtype}")
    return MeasuringSetting(device, dtype, rounds, rates)


class Figures(NamedTuple):
    """The measurements of one formulation.

    Attributes:
        timing: its time.
        peak_mb: its peak memory in MB (10^6 bytes), if measured.
        error: its error relative to that of plain PyTorch, if checked.
        floor: seconds that the device needs at least, if known.
    """

    timing: Timing
    peak_mb: float | None
    error: float | None
    floor: float | None


# Figures by the name of the formulation and whether the backward pass is included.
Measured = dict[tuple[str, bool], Figures]


def time_in_turn(
    steps: Mapping[str, Callable[[], object]], setting: MeasuringSetting, optional: Sequence[str], on_gpu: bool
) -> dict[str, Timing]:
    """Time the steps that can run, in turn.

    Args:
        steps: a function for each formulation.
        setting: conditions of the measurement.
        optional: names of formulations that are left out if they fail; others are left out if they lack memory.
        on_gpu: record the GPU's own time.
    """
    runnable = {}
    for name, step in steps.items():
        try:
            step()
            runnable[name] = step
        except Exception as error:
            if name not in optional and not isinstance(error, torch.OutOfMemoryError):
                raise
            print(f"{'ours' if name == nets.OURS else name} is left out: {first_line(error)}")
    return interleave(runnable, setting.rounds, warmup=1, on_gpu=on_gpu)


def measure_layer(layer: Layer, batch: int, setting: MeasuringSetting, compiling: bool) -> Measured:
    """Measure the formulations of a primitive in a layer.

    Args:
        layer: the layer that calls the primitive.
        batch: images of the batch.
        setting: conditions of the measurement.
        compiling: measure torch.compile, too.

    Raises:
        ValueError: our formulation is not exact enough.
    """
    # Otherwise the compiled code of all layers would add up.
    torch.compiler.reset()
    call, formulations, names = layer.call(batch, setting.device), FORMULATIONS[layer.primitive], []
    for name, formulation in formulations.items():
        if formulation.external and not setting.external:
            continue
        reason = formulation.obstacle(call)
        if reason is None and (compiling or name != TORCH_COMPILE):
            names.append(name)
        elif reason is not None and setting.is_cuda:
            print(f"{name} is left out of {layer.describe(batch)}: {reason}")
    inputs = primitives.make_inputs(layer, batch, getattr(torch, setting.dtype), setting.device)
    errors = primitives.check(layer, names, inputs)
    names = exact_enough(errors, layer.describe(batch))
    external = [name for name in names if formulations[name].external]
    measured = {}
    for train in DIRECTIONS:
        steps = {name: primitives.make_step(layer, name, inputs, train) for name in names}
        timings = time_in_turn(steps, setting, external, setting.is_cuda)
        floor = setting.floor(*layer.floor(batch, inputs.qkv.element_size(), train))
        for name, timing in timings.items():
            peak_mb = peak_memory_mb(partial(steps.__getitem__, name), setting.device) if setting.is_cuda else None
            measured[name, train] = Figures(timing, peak_mb, errors[name], floor)
    return measured


def total(measured_layers: Sequence[tuple[Layer, Measured]]) -> Measured:
    """Sum the times of all layers, for the formulations that ran in every layer; take maxima of memory and error."""
    sums = {}
    for key in measured_layers[0][1]:
        parts = [(layer.count, measured[key]) for layer, measured in measured_layers if key in measured]
        if len(parts) < len(measured_layers):
            continue
        timing = Timing.sum([(count, figures.timing) for count, figures in parts])
        peaks = [figures.peak_mb for _, figures in parts if figures.peak_mb is not None]
        errors = [figures.error for _, figures in parts if figures.error is not None]
        floors = [count * figures.floor for count, figures in parts if figures.floor is not None]
        sums[key] = Figures(timing, max(peaks, default=None), max(errors, default=0.0), sum(floors) if floors else None)
    return sums


def measure_subject(subject: Subject, setting: MeasuringSetting, compiling: bool) -> Measured:
    """Measure the formulations of an op or a net.

    Args:
        subject: the op or net.
        setting: conditions of the measurement.
        compiling: measure torch.compile of an op on a GPU, too.

    Raises:
        ValueError: our formulation is not exact enough.
    """
    torch.compiler.reset()
    on_gpu = subject.is_op and setting.is_cuda
    names = subject.formulations()
    optional = [TORCH_COMPILE]
    for formulations in FORMULATIONS.values():
        optional += [name for name, formulation in formulations.items() if formulation.external]
    has_peers = len(names) > 1
    if has_peers and on_gpu and compiling:
        names.append(TORCH_COMPILE)
    errors: Mapping[str, float] = {}
    # Without peers, our formulation is plain PyTorch itself, so there is nothing to check.
    if has_peers:
        errors = nets.check(subject, names, optional)
        names = exact_enough(errors, subject.name)
    measured = {}
    for train in DIRECTIONS:
        makers = {name: partial(nets.make_step, subject, name, train) for name in names}
        timings = time_in_turn({name: make() for name, make in makers.items()}, setting, optional, on_gpu)
        floor = setting.floor(*subject.floor(train)) if on_gpu else None
        for name, timing in timings.items():
            has_memory = setting.is_cuda or not subject.is_op
            peak_mb = peak_memory_mb(makers[name], setting.device) if has_memory else None
            measured[name, train] = Figures(timing, peak_mb, errors.get(name), floor)
    return measured


def make_rows(
    measured: Measured, setting: MeasuringSetting, shape: str, series: str, batch: int, pixels: int, name: str = ""
) -> list[Row]:
    """Return the rows of formulations that were timed in turn; `ratio` is relative to the second one, the baseline.

    Args:
        measured: figures of the formulations.
        setting: conditions of the measurement.
        shape: shape of the input, in words.
        series: name of the layer, op or net, the same for every size of the image.
        batch: images of the batch.
        pixels: pixels of an image.
        name: name of the op or net; empty for primitives, whose formulations have names.
    """
    names = list(dict.fromkeys(formulation for formulation, _ in measured))
    baseline_name = names[1] if len(names) > 1 else None
    rows = []
    for (formulation, train), figures in measured.items():
        against = None
        if baseline_name is not None and formulation != baseline_name:
            baseline = measured.get((baseline_name, train))
            against = None if baseline is None else (baseline_name, baseline.timing)
        row = make_row(
            comma_separated(name, formulation),
            figures.timing,
            against=against,
            shape=shape,
            dtype=setting.dtype,
            device=setting.device,
            peak_mb=figures.peak_mb,
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


def measure_primitive(
    primitive: str, image_size: Pair, batch: int, setting: MeasuringSetting, compiling: bool
) -> tuple[list[Row], list[Row]]:
    """Measure a primitive in all layers of its net.

    Returns:
        A row for each layer, formulation and direction;
        a row for each formulation and direction, summed over the layers.
    """
    rows, sums, pixels = [], [], image_size[0] * image_size[1]
    variants: dict[str, list[tuple[Layer, Measured]]] = {}
    for layer in layers.layers(primitive, image_size, all_neighborhoods=setting.is_cuda):
        try:
            measured = measure_layer(layer, batch, setting, compiling)
        except torch.OutOfMemoryError:
            print(f"{layer.describe(batch)} is left out: out of memory")
            measured = {}
        variants.setdefault(layer.variant, []).append((layer, measured))
        rows += make_rows(measured, setting, layer.describe(batch), layer.series, batch, pixels)
    for variant, measured_layers in variants.items():
        if all(measured for _, measured in measured_layers):
            series = comma_separated(f"{primitive}, all layers of {measured_layers[0][0].net}", variant)
            count = sum(layer.count for layer, _ in measured_layers)
            shape = comma_separated(f"{batch} x {count} layers", variant)
            sums += make_rows(total(measured_layers), setting, shape, series, batch, pixels)
    return rows, sums


@dataclass(frozen=True)
class Plan:
    """The ops and nets to measure, in this order.

    Attributes:
        nets: names of nets.
        net_batch: images of a batch of the nets.
        primitives: names of primitives.
        ops: names of ops.
        batches: images of a batch of the primitives and ops, for each image size (height, width).
        compile_ops: measure torch.compile of ops. For all ops this would take hours.
    """

    nets: list[str]
    net_batch: int
    primitives: list[str]
    ops: list[str]
    batches: dict[Pair, int]
    compile_ops: bool


def make_plan(
    ops: Sequence[str] | None,
    models: Sequence[str] | None,
    image_sizes: Sequence[Pair] | None,
    batch_size: int | None,
    cuda: bool,
    tune: bool = False,
) -> Plan:
    """Return the plan of a benchmark; each argument that is None is chosen to fit the machine.

    Args:
        ops: names of primitives and ops. All of them by default if `models` is None, too, or with `tune`; else none.
        models: names of nets. Some of them by default if `ops` is None, too; else none.
        image_sizes: (height, width) in pixels.
        batch_size: images of a batch.
        cuda: the device is a GPU.
        tune: the kernels will be tuned.

    Raises:
        ValueError: an op or a net is unknown.
    """
    everything = ops is None and models is None
    known_ops = [*PRIMITIVES, *list_ops()]
    if ops is None:
        ops = known_ops if everything or tune else []
    if models is None:
        models = (GPU_NETS if cuda else CPU_NETS) if everything else []
    for name in ops:
        if name not in known_ops:
            raise ValueError(f"there is no op {name!r}.{nearest(name, known_ops)} There are: {', '.join(known_ops)}")
    for name in models:
        if not timm.is_model(name):
            raise ValueError(f"there is no net {name!r}.{nearest(name, timm.list_models())}")
    if image_sizes is None:
        image_sizes = GPU_IMAGE_SIZES if cuda else CPU_IMAGE_SIZES
    net_batch, batches = 128 if cuda else 8, {}
    for size in image_sizes:
        batches[size] = 1 if not cuda else 128 if max(size) <= 224 else 4
    if batch_size is not None:
        net_batch, batches = batch_size, dict.fromkeys(image_sizes, batch_size)
    return Plan(
        list(models),
        net_batch,
        [name for name in ops if name in PRIMITIVES],
        [name for name in ops if name not in PRIMITIVES],
        batches,
        compile_ops=not everything,
    )


def measure_tables(plan: Plan, setting: MeasuringSetting) -> Iterator[tuple[str, list[Row]]]:
    """Carry out a plan, and yield the title and the rows of each table."""
    device = str(setting.device)
    for name in plan.nets:
        subject = nets.make_subject(name, NET_IMAGE_SIZE, plan.net_batch, device, setting.dtype)
        measured = measure_subject(subject, setting, compiling=False)
        pixels = NET_IMAGE_SIZE[0] * NET_IMAGE_SIZE[1]
        rows = make_rows(measured, setting, subject.describe(), name, plan.net_batch, pixels, name)
        yield f"{name}, in which only the attention differs", rows
    for i, (size, batch) in enumerate(plan.batches.items()):
        images, pixels, first = f"images of {size[0]} x {size[1]}", size[0] * size[1], i == 0
        for primitive in plan.primitives:
            layer_rows, sum_rows = measure_primitive(primitive, size, batch, setting, compiling=first)
            yield f"{primitive}, {images}", layer_rows
            yield f"{primitive}, summed over the layers of a net, {images}", sum_rows
        rows = []
        for name in plan.ops:
            subject = nets.make_subject(name, size, batch, device, setting.dtype)
            try:
                measured = measure_subject(subject, setting, compiling=first and plan.compile_ops)
            except torch.OutOfMemoryError:
                print(f"{name} is left out of {images}: out of memory")
                continue
            rows += make_rows(measured, setting, subject.describe(), "ops", batch, pixels, name)
        yield f"ops, {images}", rows
