"""Kinds of claims: how a net, an op or a part of ours is built and run for a reference vector."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import Tensor, nn

from models import DenseBackbone
from ops import create_op


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
class Part:
    """A part of a net, or a net with more outputs than scores.

    Attributes:
        make: builds the module.
        call: returns the vector's outputs for the module and the vector's input; by default the module's one output.
        constants: how many of the vector's parameters are buffers here, as they are never trained.
    """

    make: Callable[[], nn.Module]
    call: Callable[[Any, Tensor], tuple[Tensor, ...]] = lambda module, x: (module(x),)
    constants: int = 0

    def build(self, vector: Mapping[str, Any]) -> nn.Module:
        """Build the module."""
        return self.make()

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in the vector's order."""
        return self.call(model, x)


def classes(vector: Mapping[str, Any]) -> int:
    """Return the number of classes of a vector's net."""
    return vector["outputs"]["logits"]["shape"][-1]
