"""Kinds of claims whose ops need more than their arguments: special inputs, several outputs, joined weights."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.plain import Block
from models.weights import apply_renames, join_projections
from ops import create_op
from ops.attention.hyena import long_convolution
from ops.functional import map_attention
from ops.losses import Losses
from ops.windows import window_means
from tests.vectors.kinds import Op


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
class ResidualOp(Op):
    """An op whose vector has the sum of input and output, and the output."""

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the sum and the output in the vector's layout."""
        (out,) = super().run(model, vector, x)
        return x + out, out


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
class ProbSparseOp(Op):
    """Op `prob_sparse`, whose vectors draw the keys 7 i + 3 s of query i, modulo the number of tokens."""

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the output."""
        op: Any = model
        tokens, side = x.shape[1], math.isqrt(x.shape[1])
        sample = (7 * torch.arange(tokens)[:, None] + 3 * torch.arange(vector["kwargs"]["U"])) % tokens
        return (op.attend(x.unflatten(1, (side, side)), sample).flatten(1, 2),)


@dataclass(frozen=True)
class RoutingOp(Op):
    """Op `cluster_routing`, whose vectors also hold the weighted commitment loss and twice this loss."""

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the output and the two losses."""
        losses, side = Losses(), math.isqrt(x.shape[1])
        out = model(x.unflatten(1, (side, side)), losses=losses).flatten(1, 2)
        loss = losses.means()["commitment"] * vector["kwargs"]["commitment_factor"]
        return out, torch.stack([loss, 2 * loss])
