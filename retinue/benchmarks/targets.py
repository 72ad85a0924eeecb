"""Targets of speed on a GPU: the measurements that decide them, the most important ones first, within a time limit."""

import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from retinue.benchmarks import heads, limits, models, nets, ops
from retinue.benchmarks.forms import COMPILED, EAGER, GRAPH, REDUCE_OVERHEAD, WHOLE
from retinue.benchmarks.formulations import PLAIN_PYTORCH
from retinue.benchmarks.numerics import first_line
from retinue.benchmarks.ops import DIRECTIONS, MeasuringSetting
from retinue.benchmarks.options import Pair
from retinue.benchmarks.target_rows import find, make_target, milliseconds, quotient
from retinue.benchmarks.timing import Row, describe_device, versions
from retinue.utils.paths import PROJECT

BOTH_DIRECTIONS = DIRECTIONS[True]


@dataclass(frozen=True)
class Scale:
    """Sizes of all measurements.

    Attributes:
        setting: device, type and rounds, without external formulations.
        batch: images of a batch at `image_size`.
        image_size: (height, width) of the images in pixels.
        dense_batch: images of a batch at `dense_size`.
        dense_size: (height, width) of a detector's images in pixels.
        forms: forms of the nets that targets are about.
        more_forms: forms of the nets that explain the others.
        nets: the net of each target of `NET_TARGETS` by its name.
        train: arguments of `train.py` for the run on the digits.
        compile: values of `task.compile` for this run.
    """

    setting: MeasuringSetting
    batch: int
    image_size: Pair
    dense_batch: int
    dense_size: Pair
    forms: tuple[str, ...]
    more_forms: tuple[str, ...]
    nets: dict[str, str]
    train: tuple[str, ...]
    compile: tuple[str, ...]


@dataclass(frozen=True)
class NetTarget:
    """Speed and memory that a net should reach relative to a peer, compiled against compiled.

    Attributes:
        peer: formulation of the attention, or TIMM.
        training: speed of a training step relative to the peer.
        inference: speed of inference relative to the peer.
        memory: peak memory of a training step relative to the peer.
    """

    peer: str
    training: float
    inference: float
    memory: float


NET_TARGETS = {
    "swin_tiny": NetTarget(nets.TIMM, 1.5, 2.0, 0.8),
    "biformer_small": NetTarget("gather, matmul, softmax", 3.0, 2.0, 0.45),
    "nat_mini": NetTarget(PLAIN_PYTORCH, 2.5, 2.0, 0.6),
}


def full_scale(setting: MeasuringSetting) -> Scale:
    """Return the sizes of the targets, for a GPU."""
    return Scale(
        replace(setting, external=False),
        128,
        (224, 224),
        2,
        (800, 1333),
        (EAGER, COMPILED),
        (WHOLE, GRAPH, REDUCE_OVERHEAD),
        {name: name for name in NET_TARGETS},
        ("trainer.accelerator=gpu",),
        ("false", "reduce-overhead"),
    )


def dry_scale(setting: MeasuringSetting) -> Scale:
    """Return the smallest sizes, which run the same code on any machine; the figures mean nothing."""
    small_nets = {"swin_tiny": "swin_nano", "biformer_small": "biformer_nano"}
    train = ("trainer.accelerator=cpu", "data.num_workers=0", "trainer.limit_train_batches=1", "recipe.epochs=1")
    return Scale(
        setting, 1, (64, 64), 1, (64, 96), (EAGER,), (EAGER,), small_nets, (*train, "data.image_size=16"), ("auto",)
    )


Section = Callable[[Scale], tuple[list[Row], list[Row]]]


def primitive_section(primitive: str) -> Section:
    """Return the section that measures a primitive in all layers of its net, at the size of classification."""

    def section(scale: Scale) -> tuple[list[Row], list[Row]]:
        layers, sums = ops.measure_primitive(primitive, scale.image_size, scale.batch, scale.setting, compiling=False)
        # The first of several variants is that of the net: on a GPU, there are dilated neighbourhoods, too.
        ours = find(sums, what=primitive, direction=BOTH_DIRECTIONS)
        targets = []
        if primitive == "routed_attention":
            targets.append(make_target("routed attention, all layers, ms", 6.0, milliseconds(ours), at_most=True))
            last = {"series": layers[-1]["series"], "direction": BOTH_DIRECTIONS}
            gain = quotient(find(layers, what="masked SDPA", **last), find(layers, what=primitive, **last), "median_ms")
            targets.append(make_target("routed attention, stage 3, relative to masked SDPA", 2.0, gain))
        elif primitive == "neighborhood_attention":
            name = "neighbourhood attention, all layers, ms"
            targets.append(make_target(name, 9.0, milliseconds(ours), at_most=True))
        elif primitive == "linear_attention":
            for row in sums:
                if row["what"] == primitive and row["direction"] == BOTH_DIRECTIONS:
                    plain = find(sums, what=PLAIN_PYTORCH, direction=BOTH_DIRECTIONS, series=row["series"])
                    name = f"{row['series']}, relative to the plain form"
                    targets.append(make_target(name, 3.0, quotient(plain, row, "median_ms")))
        return layers + sums, targets

    return section


def dense_section(scale: Scale) -> tuple[list[Row], list[Row]]:
    """Measure routed attention on a detector's images."""
    layers, sums = ops.measure_primitive(
        "routed_attention", scale.dense_size, scale.dense_batch, scale.setting, compiling=False
    )
    following = [row for row in sums if str(row["series"]).endswith("windows follow the size")]
    ours = milliseconds(find(following, what="routed_attention", direction=BOTH_DIRECTIONS))
    name = "routed attention on a detector's images, ms"
    return layers + sums, [make_target(name, 3.5, ours, at_most=True)]


def net_setting(scale: Scale) -> models.Setting:
    """Return the conditions under which nets are measured."""
    device, dtype = str(scale.setting.device), scale.setting.dtype
    return models.Setting(scale.image_size[0], scale.batch, device, dtype, channels_last=True)


def benchmark_nets(scale: Scale, names: dict[str, tuple[str, str]], forms: Sequence[str]) -> list[Row]:
    """Measure nets with their formulations, by name, in several forms; ratios are relative to the last one."""
    return models.benchmark(
        {row: {"name": name} for row, (name, _) in names.items()},
        net_setting(scale),
        rounds=scale.setting.rounds,
        against=list(names)[-1],
        forms=forms,
        formulations={row: formulation for row, (_, formulation) in names.items()},
    )


def with_peer(scale: Scale, target: str) -> dict[str, tuple[str, str]]:
    """Return the net of a target and its peer, as (name, formulation) by the name of the row."""
    net, peer = scale.nets[target], NET_TARGETS[target].peer
    if peer != nets.TIMM:
        return {net: (net, nets.OURS), f"{net}, {peer}": (net, peer)}
    # timm has no small Swin for small images, so a dry run compares the net with itself in plain PyTorch.
    timms = nets.TIMM_NETS.get(net)
    return {net: (net, nets.OURS), timms or f"{net}, plain": (timms or net, nets.OURS if timms else PLAIN_PYTORCH)}


def net_section(target: str) -> Section:
    """Return the section that measures training and inference of a net and of its peer."""

    def section(scale: Scale) -> tuple[list[Row], list[Row]]:
        if target not in scale.nets:
            return [], []
        limits, names = NET_TARGETS[target], with_peer(scale, target)
        peer = list(names)[-1]
        rows = benchmark_nets(scale, names, scale.forms)
        targets = []
        for mode, limit in (("training", limits.training), ("inference", limits.inference)):
            ours, theirs = (find(rows, what=what, mode=mode, form=scale.forms[-1]) for what in names)
            gain = quotient(theirs, ours, "median_ms")
            targets.append(make_target(f"{target}, {mode}, relative to {peer}", limit, gain))
        ours, theirs = (find(rows, what=what, mode="training", form=scale.forms[-1]) for what in names)
        memory = quotient(ours, theirs, "peak_mb")
        targets.append(make_target(f"{target}, memory, relative to {peer}", limits.memory, memory, at_most=True))
        return rows, targets

    return section


def forms_section(target: str) -> Section:
    """Return the section that measures a net of ours, and timm's, in the further forms."""

    def section(scale: Scale) -> tuple[list[Row], list[Row]]:
        if target not in scale.nets:
            return [], []
        names = with_peer(scale, target)
        kept = names if NET_TARGETS[target].peer == nets.TIMM else dict(list(names.items())[:1])
        return benchmark_nets(scale, kept, scale.more_forms), []

    return section


def kernels_section(scale: Scale) -> tuple[list[Row], list[Row]]:
    """Count the kernels of a training step of each net and of its peer; a profiler may slow down what comes later."""
    rows = []
    for target in set(NET_TARGETS) & set(scale.nets):
        rows += models.count_kernels(with_peer(scale, target), net_setting(scale), scale.forms)
    return rows, []


def deformable_section(scale: Scale) -> tuple[list[Row], list[Row]]:
    """Measure deformable attention of DINO and Mask2Former."""
    rows = heads.benchmark(scale.dense_size, scale.dense_batch, str(scale.setting.device), scale.setting.rounds)
    targets = []
    for part in ("encoder", "decoder"):
        ours = find(rows, what=heads.OURS, part=part)
        # On a GPU, the plain form is measured beside mmcv's.
        plain = find(rows, what=PLAIN_PYTORCH, part=part) or find(rows, what=heads.PLAIN_MMCV, part=part)
        gain = quotient(plain, ours, "median_ms")
        targets.append(make_target(f"deformable attention, {part}, relative to its plain form", 3.0, gain))
    return rows, targets


def peers_section(primitive: str) -> Section:
    """Return the section that measures a primitive beside compilers and libraries of others."""

    def section(scale: Scale) -> tuple[list[Row], list[Row]]:
        setting = replace(scale.setting, external=True)
        layers, sums = ops.measure_primitive(primitive, scale.image_size, scale.batch, setting, compiling=True)
        return layers + sums, []

    return section


def succeeds(command: Sequence[str], seconds: float, **environment: str) -> bool | None:
    """Run a command in the project's folder, and print the end of its output unless it succeeds.

    Returns:
        Whether the command succeeded, or None if it took longer than `seconds`.
    """
    with tempfile.TemporaryFile("w+") as output:
        try:
            code = subprocess.run(
                command, cwd=PROJECT, env=os.environ | environment, stdout=output, stderr=output, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        if code != 0:
            output.seek(0)
            end = "".join(output.readlines()[-20:])
            print(f"{' '.join(command)} ended with {code}, None for {seconds:.0f} s:\n{end}")
    return None if code is None else code == 0


def digits_section(scale: Scale) -> tuple[list[Row], list[Row]]:
    """Train on the digits from the command line, eager and compiled with CUDA graphs.

    The rate is the median of the log's rows, since a compiled run spends most of its first epoch on compiling.
    """
    rows: list[Row] = []
    for choice in scale.compile:
        with tempfile.TemporaryDirectory() as run:
            command = [sys.executable, "train.py", *scale.train, f"task.compile={choice}", f"hydra.run.dir={run}"]
            if succeeds([*command, "logger=none", "rerun=true"], 200):
                with open(Path(run) / "metrics.csv", newline="", encoding="utf-8") as file:
                    rates = [float(row["train/images_per_second"]) for row in csv.DictReader(file)]
                rows.append({"what": f"digits, task.compile={choice}", "images_per_s": statistics.median(rates)})
    fastest = max((float(row["images_per_s"] or 0) for row in rows), default=None)
    return rows, [make_target("digits, images/s", 3000, fastest)]


# Folders and files whose tests for a GPU run as a section, and the expression that selects these tests.
GPU_TESTS = ("tests/ops/kernels", "tests/retinue/runs/test_no_waiting.py")
ON_GPU = "on_the_gpu or same_bits or on_a_gpu"


def tests_section(scale: Scale) -> tuple[list[Row], list[Row]]:
    """Run the tests that need a GPU: errors in three types, equal bits, torch.compile, no waiting in a step."""
    processes = min(8, os.cpu_count() or 1) if scale.setting.is_cuda else 0
    command = [sys.executable, "-m", "pytest", *GPU_TESTS, "-k", ON_GPU, "-n", str(processes)]
    return [], [make_target("tests on the GPU pass", 1.0, succeeds(command, 150))]


def sanitizer_section(scale: Scale) -> tuple[list[Row], list[Row]]:
    """Search the kernels, on the tests in bfloat16, for wrong accesses to memory and for races in shared memory."""
    tool, targets = shutil.which("compute-sanitizer"), []
    for check in ("memcheck", "racecheck"):
        clean = None
        if tool is not None:
            pytest = [sys.executable, "-m", "pytest", GPU_TESTS[0], "-p", "no:xdist", "-k", "on_the_gpu and dtype2"]
            command = [tool, "--tool", check, "--error-exitcode", "9", *pytest]
            clean = succeeds(command, 120, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        targets.append(make_target(f"compute-sanitizer, {check}, is clean", 1.0, clean))
    return [], targets


def scan_section(scale: Scale) -> tuple[list[Row], list[Row]]:
    """Measure the selective scan in an op; its plain form is measured on a GPU only."""
    setting, pixels = scale.setting, scale.image_size[0] * scale.image_size[1]
    subject = nets.make_subject("multi_head_scan", scale.image_size, scale.batch, str(setting.device), setting.dtype)
    measured = ops.measure_subject(subject, setting, compiling=False)
    rows = ops.make_rows(measured, setting, subject.describe(), "ops", scale.batch, pixels, subject.name)
    ours = find(rows, what=subject.name, direction=BOTH_DIRECTIONS)
    plain = find(rows, what=f"{subject.name}, {PLAIN_PYTORCH}", direction=BOTH_DIRECTIONS)
    if plain is None:
        return rows, []
    return rows, [make_target(f"{subject.name}, relative to its plain form", 3.0, quotient(plain, ours, "median_ms"))]


def input_section(scale: Scale) -> tuple[list[Row], list[Row]]:
    """Measure what limits the training of Swin-T, with augmentation on the CPU and on the device."""
    rows, targets, workers = [], [], os.cpu_count() or 1
    batch, batches = max(2, scale.batch), 2 if scale.batch == 1 else 20
    for augment in ({"device": None, "decode": None}, {"device": "gpu", "decode": "reduced"}):
        measured = limits.measure(
            scale.nets["swin_tiny"],
            scale.setting.device,
            scale.setting.dtype,
            scale.image_size[0],
            batch,
            workers=workers,
            batches=batches,
            augment=augment,
        )
        print(limits.verdict(measured))
        rows += [row | augment for row in measured]
        place = f"augmented on the {'CPU' if augment['device'] is None else 'GPU'}"
        gain = quotient(find(measured, what="step"), find(measured, what="input"), "median_ms")
        targets.append(make_target(f"input {place}, relative to the step of swin_tiny", 1.0, gain))
    return rows, targets


# Sections by name: those that compile nothing first, then the most important ones.
SECTIONS: dict[str, Section] = {
    "routed_attention": primitive_section("routed_attention"),
    "dense": dense_section,
    "linear_attention": primitive_section("linear_attention"),
    "window_attention": primitive_section("window_attention"),
    "neighborhood_attention": primitive_section("neighborhood_attention"),
    "deformable": deformable_section,
    "swin_tiny": net_section("swin_tiny"),
    "biformer_small": net_section("biformer_small"),
    "nat_mini": net_section("nat_mini"),
    "selective_scan": scan_section,
    "digits": digits_section,
    "tests": tests_section,
    "input": input_section,
    "sanitizer": sanitizer_section,
    **{f"{net}_forms": forms_section(net) for net in NET_TARGETS},
    **{f"{primitive}_peers": peers_section(primitive) for primitive in ("neighborhood_attention", "window_attention")},
    "kernels": kernels_section,
}


def measure_all(scale: Scale, seconds: float, sections: Sequence[str]) -> Iterator[tuple[list[Row], list[Row]]]:
    """Measure sections one after another, and yield the rows and the targets of each.

    A section that fails is left out with a message. No section begins after the time limit.

    Args:
        scale: sizes of all measurements.
        seconds: time limit.
        sections: names of `SECTIONS`, in their order.
    """
    began = time.monotonic()
    for name in sections:
        if time.monotonic() - began > seconds:
            print(f"{name} is left out: the {seconds:.0f} s are over")
            continue
        try:
            rows, targets = SECTIONS[name](scale)
        except Exception as error:
            print(f"{name} is left out: {type(error).__name__}: {first_line(error)}")
            continue
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"{name}: measured after {time.monotonic() - began:.0f} s", flush=True)
        facts = {"device": describe_device(scale.setting.device)}
        facts["versions"] = ", ".join(f"{package} {number}" for package, number in versions().items())
        yield [{"section": name} | row for row in rows], [target | facts for target in targets]
