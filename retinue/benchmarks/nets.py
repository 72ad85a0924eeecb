"""Whole ops and nets in which only the formulation of the attention differs."""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import models  # registers our nets
from models.weights import rename_weights
from ops import create_ops, list_ops
from ops.backend import redirecting, using
from retinue.benchmarks.formulations import FORMULATIONS, PLAIN_PYTORCH, TORCH_COMPILE, Attend
from retinue.benchmarks.numerics import CHECKED_IMAGES, MAX_OWN_ERROR, first_line, relative_errors
from retinue.benchmarks.options import Pair
from retinue.benchmarks.timing import autocast
from retinue.utils.arithmetic import ceil_div

# Names of formulations: our op or net, and timm's net.
OURS, TIMM = "", "timm"
# An op is measured as in the first of four stages, where maps are largest.
OP_DIM, OP_HEADS, OP_STRIDE = 64, 2, 4
# Formulations of each primitive that are measured in whole ops and nets. The first one is the baseline that speed-ups
# are relative to, and the only one that is measured on the CPU.
NET_PEERS = {
    "routed_attention": ("gather, matmul, softmax", "index_select + SDPA"),
    "window_attention": ("cut, matmul, softmax", "cut, masked SDPA"),
    "neighborhood_attention": (PLAIN_PYTORCH, "FlexAttention"),
    "linear_attention": (PLAIN_PYTORCH,),
    "selective_scan": (PLAIN_PYTORCH,),
}
# timm's nets that equal ours, with 224 x 224 pixels.
TIMM_NETS = {"swin_tiny": "swin_tiny_patch4_window7_224", "swin_small": "swin_small_patch4_window7_224"}


@dataclass(frozen=True)
class Subject:
    """An op or a net that is measured in several formulations.

    Attributes:
        name: name of the op or net.
        shape: shape of its input: (B, H, W, C) of an op, (B, 3, H, W) of a net.
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32", or the type of autocast.
    """

    name: str
    shape: tuple[int, ...]
    device: str
    dtype: str

    @property
    def is_op(self) -> bool:
        """True for an op, False for a net."""
        return self.name in list_ops()

    def describe(self) -> str:
        """Return the shape of the input in words."""
        return " x ".join(map(str, self.shape))

    def for_checking(self) -> "Subject":
        """Return the subject with inputs that suffice to check it.

        These are few images, of a net on the CPU also half as large; timm's nets do not take another size.
        """
        batch, *shape = self.shape
        if not self.is_op and self.device == "cpu" and self.name not in TIMM_NETS:
            shape = [3, *(n // 2 for n in shape[1:])]
        return replace(self, shape=(min(batch, CHECKED_IMAGES), *shape))

    def build(self, formulation: str = OURS) -> nn.Module:
        """Build the op or net on the CPU, with the same random weights for every formulation."""
        torch.manual_seed(0)
        if self.is_op:
            # The second op of a stage is shifted or dilated.
            ops, contexts = create_ops([self.name, self.name], OP_DIM, OP_HEADS)
            return WithContext(ops[1], contexts[1])
        if self.name not in TIMM_NETS:
            net = timm.create_model(self.name)
        else:
            net = timm.create_model(TIMM_NETS[self.name], drop_path_rate=0.0)
            if formulation != TIMM:
                weights = by_authors_names(net.state_dict())
                net = timm.create_model(self.name)
                models.load_weights(net, weights)
        return net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def primitives(self) -> list[str]:
        """Return the sorted names of the primitives that a forward pass calls."""
        called = set()

        def recorder(name: str) -> Attend:
            def record(primitive: Attend, *args: Any, **kwargs: Any) -> Tensor:
                called.add(name)
                return primitive(*args, **kwargs)

            return record

        net = self.build().eval().to("meta")
        with using("torch"), redirecting({name: recorder(name) for name in FORMULATIONS}), torch.no_grad():
            net(torch.empty(self.shape, device="meta"))
        return sorted(called)

    def formulations(self) -> list[str]:
        """Return the names of our formulation and of its peers on this device; the second is the baseline."""
        cuda = torch.device(self.device).type == "cuda"
        names = [OURS]
        for primitive in self.primitives():
            peers = NET_PEERS[primitive] if cuda else NET_PEERS[primitive][:1]
            # On the CPU our formulation is plain PyTorch itself.
            names += [name for name in peers if cuda or name != PLAIN_PYTORCH]
        if self.name in TIMM_NETS and self.shape[2:] == (224, 224):
            names.append(TIMM)
        return names

    def floor(self, train: bool) -> tuple[float, float]:
        """Return the bytes and FLOPs that an op needs at least, in float32.

        Forward reads the map and the weights and writes a map. Backward reads the map, the output's gradient and the
        weights, and writes the gradients of map and weights, with twice the FLOPs of forward.
        """
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            net = self.build()
            net(torch.empty(self.shape))
        weights = sum(parameter.numel() for parameter in net.parameters())
        values = torch.Size(self.shape).numel() * (5 if train else 2) + weights * (3 if train else 1)
        return 4 * values, counter.get_total_flops() * (3 if train else 1)


class WithContext(nn.Module):
    """An op with the module that makes its context.

    The blocks of a stage share one context, so it is made once, in the first forward pass, and not timed.
    """

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
    """Rename weights of timm's Swin as the authors' code names them.

    timm downsamples at the start of a stage rather than at the end of the previous one, and puts the classifier's layer
    inside a head.
    """

    def previous_stage(match: re.Match[str]) -> str:
        return f"layers.{int(match[1]) - 1}.downsample."

    return {
        re.sub(r"^layers\.(\d)\.downsample\.", previous_stage, name).replace("head.fc.", "head."): tensor
        for name, tensor in weights.items()
    }


def with_recorded_routes(routes: list[Tensor], attend: Attend | None = None) -> Attend:
    """Return a redirection of routed attention that repeats recorded routes, so that two nets can be compared.

    By rounding, two nets may choose differently between windows of almost equal affinity.

    Args:
        routes: the routes of each call so far; where there are none yet, the call's own routes are appended.
        attend: the formulation that computes attention; by default the primitive.
    """
    recorded_routes = iter(list(routes))

    def call(primitive: Attend, qkv: Tensor, index: Tensor, *args: Any) -> Tensor:
        route = next(recorded_routes, None)
        if route is None:
            routes.append(index)
            route = index
        return (primitive if attend is None else attend)(qkv, route, *args)

    return call


def instead_of_primitive(attend: Attend) -> Attend:
    """Return a redirection that calls `attend` instead of the primitive."""

    def call(primitive: Attend, *args: Any, **kwargs: Any) -> Tensor:
        return attend(*args, **kwargs)

    return call


def redirections_to(formulation: str, routes: list[Tensor] | None = None) -> dict[str, Attend]:
    """Return the redirections of primitives that make a net compute a formulation.

    Args:
        formulation: a name as in `make_step`. Only names of peers need redirections.
        routes: routes of routed attention to repeat, as in `with_recorded_routes`.
    """
    attends: dict[str, Attend] = {}
    # Plain PyTorch is the primitive's own form under the back end `torch`.
    if formulation not in (PLAIN_PYTORCH, TORCH_COMPILE):
        attends = {name: peers[formulation].attend for name, peers in FORMULATIONS.items() if formulation in peers}
    redirections = {name: instead_of_primitive(attend) for name, attend in attends.items()}
    if routes is not None:
        redirections["routed_attention"] = with_recorded_routes(routes, attends.get("routed_attention"))
    return redirections


def make_step(
    subject: Subject,
    formulation: str,
    train: bool,
    routes: list[Tensor] | None = None,
    exact: bool = False,
) -> Callable[[], dict[str, Tensor]]:
    """Return a function that computes a subject's output, with `train` also the gradients of weights and an op's map.

    Args:
        subject: the op or net.
        formulation: OURS, the name of a peer, PLAIN_PYTORCH, TORCH_COMPILE (of plain PyTorch) or TIMM.
        train: compute gradients.
        routes: routes of routed attention to repeat, as in `with_recorded_routes`.
        exact: compute in float64.
    """
    net = subject.build(formulation).to(subject.device).train(train)
    torch.manual_seed(1)
    x = torch.randn(subject.shape).to(subject.device)
    dout = torch.randn(subject.shape if subject.is_op else (subject.shape[0], 1000)).to(x)
    if exact:
        net, x, dout = net.double(), x.double(), dout.double()
        net = net.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    leaves: dict[str, Tensor] = dict(net.named_parameters())
    if subject.is_op and train:
        leaves["map"] = x.requires_grad_()
    elif not subject.is_op and not exact:
        # In float64, convolutions of channels-last images are slow on the CPU.
        x = x.contiguous(memory_format=torch.channels_last)
    run: Callable[[Tensor], Tensor] = torch.compile(net, dynamic=False) if formulation == TORCH_COMPILE else net
    backend = "torch" if formulation in (PLAIN_PYTORCH, TORCH_COMPILE) else "auto"
    redirections = redirections_to(formulation, routes)

    def step() -> dict[str, Tensor]:
        precision = contextlib.nullcontext() if exact else autocast(subject.device, subject.dtype)
        with using(backend), redirecting(redirections), precision, torch.set_grad_enabled(train):
            out = run(x)
        if not train:
            return {"output": out}
        grads = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype), allow_unused=True)
        used = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
        return {"output": out.detach(), **used}

    return step


def check(subject: Subject, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, float]:
    """Return the largest error, of output and gradients, of each formulation relative to that of plain PyTorch.

    Args:
        subject: the op or net, of which few images are computed.
        names: names of the formulations; the first one is ours.
        optional: names of formulations that are left out if they fail; others are left out if they lack memory.

    Raises:
        ValueError: the error of the first formulation is larger than `MAX_OWN_ERROR`.
    """
    routes: list[Tensor] = []
    checked = subject.for_checking()
    exact = make_step(checked, PLAIN_PYTORCH, True, routes, exact=True)()
    plain = make_step(checked, PLAIN_PYTORCH, True, routes)()
    largest_gradient = max(float(grad.abs().max()) for name, grad in exact.items() if name != "output")
    errors = {}
    for name in names:
        try:
            computed = make_step(checked, name, True, routes)()
        except Exception as error:
            if name == names[0] or (name not in optional and not isinstance(error, torch.OutOfMemoryError)):
                raise
            print(f"{name} is left out of {subject.name}: {first_line(error)}")
            continue
        if name == TIMM:
            output = computed.pop("output")
            computed = {"output": output, **rename_weights(subject.build(), by_authors_names(computed))}
        # The gradient of a bias that precedes batch norm is noise, so the scale of gradients is that of the largest.
        tensor_errors = {
            tensor: relative_errors(
                [computed[tensor]], [plain[tensor]], [exact[tensor]], 0.0 if tensor == "output" else largest_gradient
            )[0]
            for tensor in exact
        }
        worst = max(tensor_errors, key=tensor_errors.__getitem__)
        errors[name] = tensor_errors[worst]
        if name == names[0] and not errors[name] <= MAX_OWN_ERROR:
            raise ValueError(
                f"{subject.name} errs {errors[name]:.3g} times as much as with plain PyTorch in {worst}, "
                f"more than {MAX_OWN_ERROR}: {subject.describe()}, {subject.dtype}"
            )
    return errors


def make_subject(name: str, image_size: Pair, batch: int, device: str, dtype: str) -> Subject:
    """Return an op on the map of the first stage, or a net on images.

    Args:
        name: name of an op or a net.
        image_size: (height, width) of the images in pixels.
        batch: images of a batch.
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32", or the type of autocast.
    """
    H, W = image_size
    shape = (batch, ceil_div(H, OP_STRIDE), ceil_div(W, OP_STRIDE), OP_DIM) if name in list_ops() else (batch, 3, H, W)
    return Subject(name, shape, device, dtype)
