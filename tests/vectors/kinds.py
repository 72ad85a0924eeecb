"""Kinds of claims: how a net, an op or a part of ours is built and run for a reference vector."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import Tensor, nn

from models import DenseBackbone
from ops import create_op
from ops.attention.hyena import long_convolution
from ops.blocks import Blocks


@dataclass(frozen=True)
class Net:
    """A net of timm's registry, ours or timm's.

    A vector of stage maps is claimed by the net's dense features, and one of stage maps and logits by the classifier.

    Attributes:
        name: registry name.
        arguments: arguments of `timm.create_model`, or of `DenseBackbone` for a vector of stage maps.
        constants: how many of the vector's parameters are constants here, as they are never trained.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    constants: int = 0

    def build(self, vector: Mapping[str, Any]) -> nn.Module:
        """Build the net or its dense features."""
        if "stage1" in vector["outputs"] and "logits" not in vector["outputs"]:
            return DenseBackbone(self.name, **self.arguments)
        bands = vector["input_shape"][1]
        return timm.create_model(self.name, num_classes=classes(vector), in_chans=bands, **self.arguments)

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in the vector's order."""
        if {"stage1", "logits"} <= set(vector["outputs"]):
            classifier: Any = model
            features, maps = classifier.forward_intermediates(x)
            return *maps, classifier.forward_head(features)
        outputs = model(x)
        return outputs if isinstance(outputs, tuple) else (outputs,)


@dataclass(frozen=True)
class ClassTokenNet(Net):
    """A net with a class token, whose vector has the logits and the final tokens of the map."""

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the logits and the tokens (B, H * W, C)."""
        net: Any = model
        tokens = net.forward_features(x)
        return net.forward_head(tokens), tokens[:, 1:]


@dataclass(frozen=True)
class Op:
    """An op on its own.

    Attributes:
        name: the op's registered name.
        renames: names of the vector's `kwargs` -> names of our arguments; `kwargs` that it lacks are left out.
        arguments: arguments of ours that the vector's `kwargs` do not name.
        layout: how the vector's input and output hold the map: NHWC, NCHW or tokens (B, H * W, C), which are a
            square map where `kwargs` has no H and W.
    """

    name: str
    renames: Mapping[str, str]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    layout: str = "NHWC"

    def build(self, vector: Mapping[str, Any]) -> nn.Module:
        """Build the op with the vector's arguments."""
        taken = {self.renames[key]: value for key, value in vector["kwargs"].items() if key in self.renames}
        return create_op(self.name, **{**self.arguments, **taken})

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the one output in the vector's layout."""
        if self.layout == "tokens":
            side = math.isqrt(x.shape[1])
            size = (vector["kwargs"].get("H", side), vector["kwargs"].get("W", side))
            return (model(x.unflatten(1, size)).flatten(1, 2),)
        if self.layout == "NCHW":
            return (model(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),)
        return (model(x),)


@dataclass(frozen=True)
class Chain(Op):
    """Several ops in `layers`, each of whose outputs is added to its input; `kwargs` hold a list with an entry each."""

    def build(self, vector: Mapping[str, Any]) -> nn.Module:
        """Build the ops with the vector's arguments."""
        lists = {self.renames[key]: value for key, value in vector["kwargs"].items() if key in self.renames}
        taken = [dict(zip(lists, entries, strict=True)) for entries in zip(*lists.values(), strict=True)]
        dim = vector["input_shape"][-1]
        ops = [create_op(self.name, **{"dim": dim, **self.arguments, **entry}) for entry in taken]
        return nn.ModuleDict({"layers": nn.ModuleList(ops)})

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the last sum in the vector's layout."""
        for op in model.get_submodule("layers").children():
            x = x + super().run(op, vector, x)[0]
        return (x,)


@dataclass(frozen=True)
class HyenaOp(Op):
    """Op `hyena`, whose vectors also hold its filters and one long convolution without the skip."""

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the output, the filters of each long convolution, and the first of these convolutions."""
        out, dim = super().run(model, vector, x)[0], x.shape[-1]
        filters = model.get_submodule("filter")(x.shape[1:3])
        convolution = long_convolution(x.permute(0, 3, 1, 2), filters[:dim], x.new_zeros(dim))
        return out, filters.unflatten(0, (-1, dim)), convolution

    def build(self, vector: Mapping[str, Any]) -> nn.Module:
        """Build the op with the vector's arguments."""
        kind = "joint" if vector["kwargs"].get("hyena2d_filter") else "product"
        direction = vector["kwargs"].get("directional_mode", "standard")
        return Op(self.name, self.renames, {"num_heads": 1, "filter": kind, "direction": direction}).build(vector)


@dataclass(frozen=True)
class BlockMixtureOp(Op):
    """Op `block_mixture`, whose vectors describe the blocks in words: "4x4 tiles" or "2 rows"."""

    def build(self, vector: Mapping[str, Any]) -> nn.Module:
        """Build the op with the vector's arguments."""
        size, order = vector["kwargs"]["chunk"].split()
        blocks = {"tile": tuple(map(int, size.split("x")))} if order == "tiles" else {"strip": int(size)}
        return Op(self.name, self.renames, {"order": order, **blocks}).build(vector)


@dataclass(frozen=True)
class RectifiedSparseOp(Op):
    """Op `rectified_sparse` on a sequence, whose vectors were made of tokens that resemble the first of their block."""

    def build(self, vector: Mapping[str, Any]) -> nn.Module:
        """Build the op with the vector's arguments."""
        given = vector["kwargs"]
        arguments = {"tile": (1, given["block"]), "neighbors": given["neighbours"] is not None, "count_padding": True}
        return Op(self.name, self.renames, arguments).build(vector)

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the output of the changed tokens."""
        block = vector["kwargs"]["block"]
        first = x[:, ::block].repeat_interleave(block, dim=1)[:, : x.shape[1]]
        return (model((0.3 * x + first).unsqueeze(1)).squeeze(1),)


@dataclass(frozen=True)
class HeadShardingOp(Op):
    """Op `head_sharding` on a sequence, whose vectors have no projections and hold its pattern too."""

    def build(self, vector: Mapping[str, Any]) -> nn.Module:
        """Build the op with the vector's arguments, and with the defaults of the authors' function."""
        causal = vector["kwargs"].get("causal", True)
        position = vector["kwargs"].get("vert_position_type") or ("absolute" if causal else "relative")
        arguments = {"dim": vector["outputs"]["out"]["shape"][-1], "order": "runs", "causal": causal}
        op: Any = Op(self.name, self.renames, {**arguments, "position": position}).build(vector)
        op.qkv, op.proj = nn.Identity(), nn.Identity()
        return op

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the output, the mask of blocks, and the number of keys of each query."""
        op: Any = model
        block = op.block[1]
        pattern = op.pattern(Blocks((1, x.shape[1]), op.block))[: vector["outputs"]["block_mask"]["shape"][0]]
        keys = pattern.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, : x.shape[1], : x.shape[1]]
        if op.causal:
            keys = keys.tril()
        return op(x.unsqueeze(1)).squeeze(1), pattern.float(), keys.sum(-1).float()


@dataclass(frozen=True)
class SpanMixtureOp(Op):
    """Op `span_mixture` in bands, whose vectors list the alpha and the beta of each head."""

    def build(self, vector: Mapping[str, Any]) -> nn.Module:
        """Build the op with the vector's arguments."""
        plan = list(zip(vector["kwargs"]["alpha"], vector["kwargs"]["beta"], strict=True))
        return Op(self.name, self.renames, {"mode": "band", "plan": plan}).build(vector)

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the output of the sequence, which need not be a square map."""
        return (model(x.unsqueeze(1)).squeeze(1),)


@dataclass(frozen=True)
class Part:
    """A part of a net, or a net with more outputs than scores.

    Attributes:
        make: builds the module.
        call: returns the vector's outputs for the module and the vector's input; by default the module's one output.
    """

    make: Callable[[], nn.Module]
    call: Callable[[Any, Tensor], tuple[Tensor, ...]] = lambda module, x: (module(x),)

    def build(self, vector: Mapping[str, Any]) -> nn.Module:
        """Build the module."""
        return self.make()

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in the vector's order."""
        return self.call(model, x)


def classes(vector: Mapping[str, Any]) -> int:
    """Return the number of classes of a vector's net."""
    return vector["outputs"]["logits"]["shape"][-1]
