"""Whole ops and nets in which only the formulation of the attention differs."""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import models  # registers our nets
from models.weights import rename_weights
from ops import create_ops, list_ops
from ops.functional import routed_attention
from retinue.benchmarks.layers import CHECKED_IMAGES, EXACT, errors, first_line
from retinue.benchmarks.peers import PLAIN, PRIMITIVES, Attend, Pair, backend

OURS, COMPILED, TIMM = "", "torch.compile", "timm"
OP_DIM, OP_HEADS = 64, 2  # of the first of four stages, where maps are largest
PEERS = {  # the first is what the others' speed is told over
    "routed_attention": ("gather, matmul, softmax", "index_select + SDPA"),
    "window_attention": ("cut, matmul, softmax", "cut, masked SDPA"),
    "neighborhood_attention": (PLAIN, "FlexAttention"),
}
TIMMS = {"swin_tiny": "swin_tiny_patch4_window7_224", "swin_small": "swin_small_patch4_window7_224"}


@dataclass(frozen=True)
class Subject:
    """An op on a map (B, H, W, C), or a net on images (B, 3, H, W)."""

    name: str
    shape: tuple[int, ...]
    device: str
    dtype: str  # autocast's

    @property
    def is_op(self) -> bool:
        return self.name in list_ops()

    def describe(self) -> str:
        return " x ".join(map(str, self.shape))

    def autocast(self) -> contextlib.AbstractContextManager:
        dtype = getattr(torch, self.dtype)
        return torch.autocast(torch.device(self.device).type, dtype, enabled=dtype != torch.float32)

    def few(self) -> "Subject":
        """Images that suffice to see a mistake; for a net on the CPU of half the size, if it takes another."""
        batch, *shape = self.shape
        if not self.is_op and self.device == "cpu" and self.name not in TIMMS:
            shape = [3, *(n // 2 for n in shape[1:])]
        return replace(self, shape=(min(batch, CHECKED_IMAGES), *shape))

    def build(self, formulation: str = OURS) -> nn.Module:
        """The same weights for every formulation."""
        torch.manual_seed(0)
        if self.is_op:
            ops, contexts = create_ops([self.name, self.name], OP_DIM, OP_HEADS)
            return WithContext(ops[1], contexts[1])  # the second of a stage is shifted or dilated
        theirs = timm.create_model(TIMMS[self.name], drop_path_rate=0.0) if self.name in TIMMS else None
        net = theirs if theirs and formulation == TIMM else timm.create_model(self.name)
        if theirs and formulation != TIMM:
            models.load_weights(net, by_authors_names(theirs.state_dict()))
        return net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def formulations(self) -> list[str]:
        """Ours and its peers on this device."""
        used, cuda = primitives(self.build()), torch.device(self.device).type == "cuda"
        names = [OURS]
        for primitive in sorted({name for _, name in used}):
            able = PEERS[primitive] if cuda else PEERS[primitive][:1]
            names += [name for name in able if cuda or name != PLAIN]  # which is what ours is on the CPU
        return names + [TIMM] * (self.name in TIMMS and self.shape[2:] == (224, 224))

    def floor(self, train: bool) -> tuple[float, float]:
        """Bytes and FLOPs that an op cannot do without: map and weights in, map out; backward, map and gradient in,
        gradients out; twice the FLOPs of forward."""
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            net = self.build()
            net(torch.empty(self.shape))
        weights = sum(p.numel() for p in net.parameters())
        values = torch.Size(self.shape).numel() * (5 if train else 2) + weights * (3 if train else 1)
        return 4 * values, counter.get_total_flops() * (3 if train else 1)


class WithContext(nn.Module):
    """An op and what makes its context, which other blocks of a stage share and is therefore made once."""

    def __init__(self, op: nn.Module, context: nn.Module | None):
        super().__init__()
        self.op, self.make_context = op, context
        self.context: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.make_context is None:
            return self.op(x)
        if self.context is None:
            with torch.no_grad():
                self.context = self.make_context(x)
        return self.op(x, context=self.context)


def by_authors_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm puts what halves a map before a stage, and the classifier's layer inside a head."""
    move = lambda match: f"layers.{int(match[1]) - 1}.downsample."  # noqa: E731
    return {re.sub(r"^layers\.(\d)\.downsample\.", move, k).replace("head.fc.", "head."): v for k, v in weights.items()}


def primitives(net: nn.Module) -> set[tuple[Any, str]]:
    """The modules of ops in a net and the primitives that they call."""
    modules = {
        inspect.getmodule(type(module)) for module in net.modules() if type(module).__module__.startswith("ops.")
    }
    return {(module, name) for module in modules for name in PRIMITIVES if name in vars(module)}


@contextlib.contextmanager
def replaced(net: nn.Module, attends: dict[str, Attend]) -> Iterator[None]:
    """Let the ops in `net` call other formulations of the primitives."""
    with contextlib.ExitStack() as stack:
        for module, name in primitives(net):
            if name in attends:
                stack.enter_context(mock.patch.object(module, name, attends[name]))
        yield


def following(attend: Attend, routes: list[Tensor]) -> Attend:
    """Routed attention with the routes that `routes` holds call by call; it notes them there where there are none.

    For comparing two nets: by rounding, they may differ in their choice between windows that are equally near.
    """
    calls = iter(routes[:])

    def follow(qkv: Tensor, index: Tensor, *rest: Any) -> Tensor:
        route = next(calls, None)
        if route is None:
            routes.append(index)
        return attend(qkv, index if route is None else route, *rest)

    return follow


def make_step(
    subject: Subject,
    formulation: str,
    train: bool,
    routes: list[Tensor] | None = None,
    exact: bool = False,
) -> Callable[[], dict[str, Tensor]]:
    """A function that runs a subject and returns its output, or with `train` also the gradients of weights and maps.

    Args:
        formulation: OURS, one of the primitive's, PLAIN, COMPILED (plain PyTorch) or TIMM.
        routes: those of routed attention, as in `following`.
        exact: compute in float64.
    """
    net = subject.build(formulation).to(subject.device).train(train)
    torch.manual_seed(1)
    x = torch.randn(subject.shape).to(subject.device)
    dout = torch.randn(subject.shape if subject.is_op else (subject.shape[0], 1000)).to(x)
    if exact:
        net, x, dout = net.double(), x.double(), dout.double()
        net = net.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    wanted: dict[str, Tensor] = dict(net.named_parameters())
    if subject.is_op and train:
        wanted["map"] = x.requires_grad_()
    elif not subject.is_op and not exact:  # whose convolutions are slow in that order on the CPU
        x = x.contiguous(memory_format=torch.channels_last)
    attends = {name: of[formulation].attend for name, of in PRIMITIVES.items() if formulation in of}
    if routes is not None:
        attends["routed_attention"] = following(attends.get("routed_attention", routed_attention), routes)
    run: Callable[[Tensor], Tensor] = torch.compile(net, dynamic=False) if formulation == COMPILED else net
    name = "torch" if formulation in (PLAIN, COMPILED) else "auto"

    def step() -> dict[str, Tensor]:
        exactly = contextlib.nullcontext() if exact else subject.autocast()
        with backend(name), replaced(net, attends), exactly, torch.set_grad_enabled(train):
            out = run(x)
        if not train:
            return {"output": out}
        found = torch.autograd.grad(out, list(wanted.values()), dout.to(out.dtype), allow_unused=True)
        grads = {key: grad for key, grad in zip(wanted, found, strict=True) if grad is not None}
        return {"output": out.detach(), **grads}

    return step


def check(subject: Subject, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, float]:
    """How many times plain PyTorch's error that of each formulation is, in its output and in the worst gradient.

    Of `optional` ones, those that fail are left out.

    Raises:
        ValueError: that of the first, which is ours, is more than twice as large.
    """
    routes: list[Tensor] = []
    few = subject.few()
    exact, plain = make_step(few, PLAIN, True, routes, exact=True)(), make_step(few, PLAIN, True, routes)()
    greatest = max(float(grad.abs().max()) for key, grad in exact.items() if key != "output")
    found = {}
    for name in names:
        try:
            ours = make_step(few, name, True, routes)()
        except Exception as error:
            if name == names[0] or (name not in optional and not isinstance(error, torch.OutOfMemoryError)):
                raise
            print(f"{name} is left out of {subject.name}: {first_line(error)}")
            continue
        if name == TIMM:
            ours = {"output": ours.pop("output"), **rename_weights(subject.build(), by_authors_names(ours))}
        times = {  # a bias before batch norm has no gradient but noise
            key: errors([ours[key]], [plain[key]], [exact[key]], 0.0 if key == "output" else greatest)[0]
            for key in exact
        }
        worst = max(times, key=times.__getitem__)
        found[name] = times[worst]
        if name == names[0] and not times[worst] <= EXACT:
            raise ValueError(
                f"{subject.name} errs {times[worst]:.3g} times as much as with plain PyTorch in {worst}, "
                f"more than {EXACT}: {subject.describe()}, {subject.dtype}"
            )
    return found


def make_subject(name: str, resolution: Pair, batch: int, device: str, dtype: str) -> Subject:
    """An op on the map of the first stage, or a net on images."""
    H, W = resolution
    shape = (batch, -(-H // 4), -(-W // 4), OP_DIM) if name in list_ops() else (batch, 3, H, W)
    return Subject(name, shape, device, dtype)
