"""Gates in any net: `ops.gates` on what its blocks or stages return, without a change of the net's own weights.

A gate is a submodule of the block after which it stands, and a forward hook of the block applies it. So the names of
the net's weights stay, pruning, sharding and layer decay treat the gate as a part of its block, and a net that timm
wraps for its features keeps its gates. A block's channels and layout follow from a run on the meta device.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.models._features import FeatureGetterNet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.func import functional_call

from ops.gate_registry import create_gate, create_gate_context, parse_gates, place_of
from ops.registry import Spec
from retinue.utils.arithmetic import ceil_div

# Largest stride of tokens relative to the image, in pixels
MAX_STRIDE = 128
# Names of the slots of timm's blocks right after the spatial convolution, which hold an identity if they are not used.
# ResNet's blocks have one for anti-aliasing; inverted residual blocks and those of RegNet have one for SE.
CONV_SLOTS = ("aa", "se")


class ForwardPass:
    """Values of the current forward pass that gates read; a copy of a net starts without them.

    Attributes:
        size: (height, width) of the images in pixels.
        contexts: Output of each module that `create_gate_context` made.
    """

    def __init__(self):
        self.size: tuple[int, int] = (0, 0)
        self.contexts: list[Tensor] = []

    def __reduce__(self) -> tuple[type, tuple]:
        # Outputs that are part of a graph can be neither copied nor saved.
        return ForwardPass, ()


@dataclass(eq=False)
class ReadImages:
    """Forward pre-hook of the module that receives the images: notes their size and computes the contexts."""

    forward_pass: ForwardPass

    def __call__(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self.forward_pass.size = (args[0].shape[-2], args[0].shape[-1])
        self.forward_pass.contexts = [body(args[0]) for body in getattr(module, "gate_contexts", ())]


@dataclass(frozen=True)
class Layout:
    """Layout of a block's output.

    Attributes:
        kind: "NCHW", "NHWC" or "tokens", (B, E + H * W, C).
        channels: Number of channels C.
        stride: Of tokens: side of the image divided by the side of the map.
        extra: Of tokens: number E of extra tokens, such as a class token.
    """

    kind: str
    channels: int
    stride: int = 1
    extra: int = 0

    def to_map(self, x: Tensor, image: tuple[int, int]) -> Tensor:
        """Return the map (B, C, H, W) of an output for images of (height, width) pixels, without extra tokens."""
        if self.kind == "NCHW":
            return x
        if self.kind == "tokens":
            x = x[:, self.extra :]
            rows, columns = ceil_div(image[0], self.stride), ceil_div(image[1], self.stride)
            # The tokens that a net has kept of a map are one row, as in `PlainBackbone.reduced_size`.
            x = x.unflatten(1, (rows, columns) if rows * columns == x.shape[1] else (1, x.shape[1]))
        return x.permute(0, 3, 1, 2)

    def from_map(self, x: Tensor, output: Tensor) -> Tensor:
        """Return a map in the layout of the block's output, which gives the extra tokens."""
        if self.kind == "NCHW":
            return x
        x = x.permute(0, 2, 3, 1)
        return x if self.kind == "NHWC" else torch.cat([output[:, : self.extra], x.flatten(1, 2)], dim=1)


@dataclass(eq=False)
class ApplyGate:
    """Forward hook that applies the `output_gate` of a module to the first of its outputs.

    Attributes:
        layout: Layout of the output.
        branch: Apply the gate to the difference of output and input, if these have one shape.
        forward_pass: Has the size of the images and the contexts.
        context: Index of the gate's context, or None.
    """

    layout: Layout
    branch: bool
    forward_pass: ForwardPass
    context: int | None

    def __call__(self, module: Any, args: tuple[Tensor, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        x = self.layout.to_map(first, self.forward_pass.size)
        arguments = () if self.context is None else (self.forward_pass.contexts[self.context],)
        if self.branch and first.shape == args[0].shape:
            before = self.layout.to_map(args[0], self.forward_pass.size)
            x = before + module.output_gate(x - before, *arguments)
        else:
            x = module.output_gate(x, *arguments)
        gated = self.layout.from_map(x, first)
        return (gated, *output[1:]) if isinstance(output, tuple) else gated


class Target(NamedTuple):
    """A gate's place: it weights what `module` returns.

    Attributes:
        spec: The gate.
        module: A block, or a layer inside one.
        at: The place of the gate, a key of `ops.gate_registry.PLACES`, or "slot": the attribute `se` of the module,
            which then applies the gate itself.
    """

    spec: Spec
    module: Any
    at: str


class Trace(NamedTuple):
    """Record of a run on the meta device.

    Attributes:
        stem: The first module that received the images and can hold further modules.
        shapes: Module -> shape of its output.
    """

    stem: nn.Module
    shapes: dict[nn.Module, torch.Size]


def insert_gates(net: nn.Module, gates: Spec | Sequence, in_chans: int, image: tuple[int, int]) -> None:
    """Put gates into a net, ours or timm's.

    `load_weights` accepts files without the gates' weights. At "branch", a gate in a ResNet stands where timm has SE,
    before the sum; in other nets it weights the difference of a block's output and input. The stages are the net's
    lists of blocks: four in a ResNet or Swin, one in a ViT, seven in MobileNetV2.

    Args:
        net: The net, which is changed in place; also one that timm has wrapped in a `FeatureGetterNet`.
        gates: Gates, as `ops.parse_gates` reads them.
        in_chans: Number of image channels.
        image: (height, width) of images that the net takes, in pixels.

    Raises:
        ValueError: A name, an argument, or the number of stages is wrong, or the net's blocks return no maps or tokens.
    """
    inner: Any = net.model if isinstance(net, FeatureGetterNet) else net
    targets = list(_find_targets(inner, gates))
    trace = _run(net, inner, [target.module for target in targets], in_chans, image)
    bodies: dict[str, nn.Module] = {}
    for spec, _, _ in targets:
        body = None if repr(spec) in bodies else create_gate_context(spec, in_chans)
        if body is not None:
            bodies[repr(spec)] = body

    forward_pass, kinds = ForwardPass(), set()
    for spec, module, at in targets:
        if module not in trace.shapes:
            raise ValueError(f"{type(inner).__name__} takes no gates: its blocks do not run one by one")
        layout = _find_layout(inner, trace.shapes[module], image)
        gate = create_gate(spec, layout.channels)
        gate.optional = True
        if at == "slot":
            module.se = gate
            continue
        module.add_module("output_gate", gate)
        context = list(bodies).index(repr(spec)) if repr(spec) in bodies else None
        module.register_forward_hook(ApplyGate(layout, at == "branch", forward_pass, context))
        kinds.add(layout.kind)
    if bodies or "tokens" in kinds:
        shared: Any = nn.ModuleList(bodies.values())
        shared.optional = True
        trace.stem.add_module("gate_contexts", shared)
        trace.stem.register_forward_pre_hook(ReadImages(forward_pass))


def find_blocks(net: Any) -> list[list[Any]]:
    """Return the blocks of each stage of a net: what its layer decay counts as a block, by the list that holds it.

    A net that does not say so has a stage of one block for each of its maps.

    Raises:
        ValueError: The net tells neither its blocks nor its maps.
    """
    matcher = net.group_matcher() if hasattr(net, "group_matcher") else None
    blocks = matcher["blocks"] if isinstance(matcher, Mapping) else ()
    patterns = [(blocks, None)] if isinstance(blocks, str) else blocks
    stages: dict[str, list[nn.Module]] = {}
    for name, module in net.named_modules():
        if any(module.children()) and any(re.fullmatch(p, name) for p, group in patterns if group is None):
            stages.setdefault(name.rpartition(".")[0], []).append(module)
    if not stages:
        stages = {info["module"]: [net.get_submodule(info["module"])] for info in getattr(net, "feature_info", ())}
    if not stages:
        raise ValueError(f"{type(net).__name__} takes no gates: it does not tell its blocks")
    return [[_last_layer(block) for block in stage] for stage in stages.values()]


def _last_layer(block: Any) -> nn.Module:
    """Return the block, or the last layer of a sequence, whose submodules are its layers and cannot be gates."""
    while isinstance(block, nn.Sequential):
        block = block[-1]
    return block


def _find_targets(net: nn.Module, gates: Spec | Sequence) -> Iterator[Target]:
    stages = find_blocks(net)
    for blocks, specs in zip(stages, parse_gates(gates, [len(stage) for stage in stages]), strict=True):
        for block, spec in zip(blocks, specs, strict=True):
            at = None if spec is None else place_of(spec)
            if spec is None or (at == "stage" and block is not blocks[-1]):
                continue
            if at == "conv":
                slots = (getattr(block, name, None) for name in CONV_SLOTS)
                slot = next((slot for slot in slots if isinstance(slot, nn.Identity)), None)
                yield Target(spec, block, "branch") if slot is None else Target(spec, slot, at)
            elif at == "branch" and isinstance(block, BasicBlock | Bottleneck) and block.se is None:
                yield Target(spec, block, "slot")
            else:
                yield Target(spec, block, str(at))


def _run(
    net: nn.Module, inner: nn.Module, modules: Sequence[nn.Module], in_chans: int, image: tuple[int, int]
) -> Trace:
    """Run a net on the meta device, and record what the modules return.

    Args:
        net: The net, or the net in a wrapper.
        inner: The net itself.
        modules: Modules that are recorded.
        in_chans: Number of image channels.
        image: (height, width) of the images in pixels.

    Raises:
        ValueError: The net does not take such images, or no module receives them.
    """
    shapes: dict[nn.Module, torch.Size] = {}
    stems: list[nn.Module] = []

    def see(module: nn.Module, args: tuple) -> None:
        if not stems and args and isinstance(args[0], Tensor) and args[0].ndim == 4:
            stems.append(module)

    def record(module: nn.Module, args: tuple, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if args and isinstance(args[0], Tensor) and isinstance(first, Tensor):
            shapes[module] = first.shape

    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    layers = [m for m in inner.modules() if m is not inner and not isinstance(m, containers)]
    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    hooks += [module.register_forward_hook(record) for module in modules]
    meta = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*net.named_parameters(), *net.named_buffers())
    }
    training = net.training
    try:
        with torch.no_grad():
            functional_call(net.eval(), meta, (torch.empty(1, in_chans, *image, device="meta"),))
    except Exception as error:
        # Nets refuse an image size by exceptions of any kind.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{type(inner).__name__} takes no images of {image} pixels: {reason}") from error
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    if not stems:
        raise ValueError(f"{type(inner).__name__} takes no gates: none of its layers receives the images")
    return Trace(stems[0], shapes)


def _find_layout(net: Any, shape: Sequence[int], image: tuple[int, int]) -> Layout:
    """Return the layout of an output, by its shape for images of (height, width) pixels.

    Raises:
        ValueError: The output is neither a map nor the tokens of one.
    """
    if len(shape) == 4:
        fits = {kind: _is_map(shape[first : first + 2], image) for kind, first in (("NCHW", 2), ("NHWC", 1))}
        # If the number of channels equals a side of the map, timm's nets tell their layout.
        order = ["NHWC", "NCHW"] if str(getattr(net, "output_fmt", "")) == "NHWC" else ["NCHW", "NHWC"]
        kind = next((kind for kind in order if fits[kind]), None)
        if kind is not None:
            return Layout(kind, shape[1 if kind == "NCHW" else 3])
    if len(shape) == 3:
        extra = next((e for name in ("num_prefix_tokens", "extra") if (e := getattr(net, name, 0))), 0)
        layouts = (
            Layout("tokens", shape[2], stride, e)
            for e in (extra, 0)
            for stride in range(1, MAX_STRIDE + 1)
            if ceil_div(image[0], stride) * ceil_div(image[1], stride) == shape[1] - e
        )
        # Tokens of which the net has removed some are one row.
        return next(layouts, Layout("tokens", shape[2], extra=extra))
    raise ValueError(f"{type(net).__name__} takes no gates: a block returns {tuple(shape)} for an image of {image}")


def _is_map(sides: Sequence[int], image: tuple[int, int]) -> bool:
    """Tell whether two sides can be those of a map: both are the image's over one whole stride."""
    stride = max(round(image[0] / sides[0]), 1)
    return all(side in (pixels // stride, ceil_div(pixels, stride)) for side, pixels in zip(sides, image, strict=True))
