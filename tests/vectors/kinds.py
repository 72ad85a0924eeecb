"""Kinds of claims: how a net, an op or a part of ours is built and run for a reference vector."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import Tensor, nn

from models import DenseBackbone
from models.plain import Block
from models.weights import apply_renames, join_projections
from ops import create_op
from ops.attention.hyena import long_convolution
from ops.functional import map_attention
from ops.windows import window_means


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
class AnchorWindowOp(Op):
    """Op `anchor_window`, whose vectors also hold the output for the anchors, which attend to each other."""

    def build(self, vector: Mapping[str, Any]) -> nn.Module:
        """Build the op with the vector's arguments."""
        kwargs = vector["kwargs"]
        form, pool = "sliding" if kwargs["sliding"] else "block", kwargs["H"] // kwargs["low"][0]
        return Op(self.name, self.renames, {**self.arguments, "form": form, "pool": pool}).build(vector)

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the output for the map and for the anchors."""
        op: Any = model
        means = window_means(x.unflatten(1, (vector["kwargs"]["H"], -1)), (op.pool, op.pool)).unsqueeze(1)
        q, k, v = op.qkv(means).chunk(3, dim=-1)
        anchors = op.proj(map_attention(q, k, v, op.num_heads))
        return *super().run(model, vector, x), anchors.squeeze(1)


@dataclass(frozen=True)
class BlockOp(Op):
    """An op inside a block with norms, MLP and residual connections, whose vectors hold tokens.

    Attributes:
        block_renames: pairs as in `renames` of nets, from the vector's names to those of `models.plain.Block`.
    """

    block_renames: tuple[tuple[str, str], ...] = ()

    def build(self, vector: Mapping[str, Any]) -> nn.Module:
        """Build the block with the vector's arguments."""
        kwargs = vector["kwargs"]
        block: Any = Block(kwargs["dim"], super().build(vector), kwargs["mlp_ratio"], eps=1e-5)
        block.renames = self.block_renames
        return block

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the block's output."""
        return (model(x, (vector["kwargs"]["H"], vector["kwargs"]["W"])),)


@dataclass(frozen=True)
class InwardWindowOp(Op):
    """Op `inward_window`, whose vectors hold the outputs with the vector's windows and with dense attention."""

    def build(self, vector: Mapping[str, Any]) -> nn.Module:
        """Build the op below the name `op`; the vector's separate projections are joined when it is loaded."""
        kwargs = vector["kwargs"]
        window = (2 * kwargs["d_h"] + 1, 2 * kwargs["d_w"] + 1)
        temperature = math.sqrt(math.log(2 * kwargs["N0"]) / math.log(kwargs["N0"]))
        arguments = {"window": window, "temperature": temperature, "qk_norm": True}
        net: Any = nn.ModuleDict({"op": create_op(self.name, kwargs["dim"], kwargs["heads"], **arguments)})
        net.renames = ((r"^", "op."),)
        net.checkpoint_filter = lambda state: join_projections(net, apply_renames(net, state))
        return net

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs with windows and with dense attention."""
        op: Any = model.get_submodule("op")
        dense = copy.copy(op)
        dense.window = (vector["kwargs"]["H"], vector["kwargs"]["W"])
        return *super().run(op, vector, x), *super().run(dense, vector, x)


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
