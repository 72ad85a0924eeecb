"""Attention of any op whose output is linear in its values: exact rows of the matrix from keys to a query.

The attention of a query is the derivative of the op's output, before its last projection, by the values, while queries
and keys are held fixed. One backward pass for each head finds it on the image, whatever windows, routes, neighbourhoods
or agents lie between, and without the op's help. For each row we check the definition itself: the values, weighted by
the row, are the op's output.
"""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from retinue.evaluation.sight.blocks import token_grid

# Name of the layer that computes the values -> number of equal parts of its output, of which the last are the values.
VALUE_LAYERS = {"qkv": 3, "kv": 2, "v": 1, "value": 1, "to_v": 1, "v_proj": 1}
# Names of the layer that reads the heads' outputs.
OUTPUT_LAYERS = ("proj", "out", "to_out", "output", "out_proj", "o_proj")
# Largest difference between an output and the weighted values, relative to the largest output.
TOLERANCE = 1e-4


@dataclass
class Call:
    """Call of an attention module in a forward pass of one image.

    Attributes:
        module: The attention module.
        args: Its arguments; the first is a map (1, H, W, C) or tokens (1, E + H * W, C).
        kwargs: Its further arguments.
        size: Size (H, W) of the map.
        extra: Number of extra tokens E.
    """

    module: Any
    args: tuple
    kwargs: dict[str, Any]
    size: tuple[int, int]
    extra: int

    @property
    def value_layers(self) -> list[tuple[nn.Module, int]]:
        """Layers that compute values, each with the number of parts of its output."""
        layers = [(getattr(self.module, name, None), parts) for name, parts in VALUE_LAYERS.items()]
        return [(layer, parts) for layer, parts in layers if isinstance(layer, nn.Linear)]

    @property
    def output_layer(self) -> nn.Linear:
        return getattr(self.module, next(name for name in OUTPUT_LAYERS if hasattr(self.module, name)))

    def token(self, y: float, x: float) -> int:
        """Return the index of the token at shares of the height and width from 0 up to 1; extra tokens come first."""
        H, W = self.size
        return self.extra + min(int(y * H), H - 1) * W + min(int(x * W), W - 1)


@dataclass(frozen=True)
class Rows:
    """Attention of Q queries.

    Attributes:
        map: Weights of the map's tokens, (heads, Q, H, W).
        extra: Weights of extra tokens, (heads, Q, E).
        outside: Weights of padding, (heads, Q).
    """

    map: Tensor
    extra: Tensor
    outside: Tensor


def find_attention(net: nn.Module) -> list[str]:
    """Return the names of the modules that have a layer for values and one that reads the heads' outputs."""
    return [
        name
        for name, module in net.named_modules()
        if any(isinstance(getattr(module, layer, None), nn.Linear) for layer in VALUE_LAYERS)
        and any(isinstance(getattr(module, layer, None), nn.Linear) for layer in OUTPUT_LAYERS)
    ]


@torch.no_grad()
def capture(net: Any, image: Tensor) -> dict[str, Call]:
    """Run one image (1, C, h, w), and return the calls of all attention modules by name.

    Modules that receive windows in place of a map are left out.

    Raises:
        ValueError: No module is left.
    """
    calls: dict[str, Call] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if args and isinstance(args[0], Tensor) and len(args[0]) == 1:
                x, others = args[0], [value for value in args[1:] if isinstance(value, Tensor) and value.ndim == 3]
                if x.ndim == 4:
                    extra = others[0].shape[1] if others and getattr(module, "takes_extra", False) else 0
                    calls[name] = Call(module, args, kwargs, (x.shape[1], x.shape[2]), extra)
                elif x.ndim == 3:
                    with suppress(ValueError):
                        H, W = token_grid(net, x.shape[1], (image.shape[2], image.shape[3]))
                        calls[name] = Call(module, args, kwargs, (H, W), x.shape[1] - H * W)

        return hook

    handles = [
        net.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True) for name in find_attention(net)
    ]
    try:
        net(image)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise ValueError(
            f"{type(net).__name__} has no attention that can be shown: no module reads a map or its tokens, and has "
            f"linear layers for values ({', '.join(VALUE_LAYERS)}) and for the output ({', '.join(OUTPUT_LAYERS)})"
        )
    return calls


def attention_rows(call: Call, queries: Sequence[int]) -> Rows:
    """Compute the attention of some queries in each head.

    Convolutions of the values, which ops add as a positional term, do not count as attention.

    Args:
        call: Call of the attention module.
        queries: Indices of tokens in the order of extra tokens and map.

    Raises:
        ValueError: The op's output is not linear in its values, or the op mixes tokens before it computes values.
    """
    module, Q = call.module, len(queries)
    args, kwargs = tree_map_only(
        Tensor,
        lambda t: t.detach().repeat_interleave(Q, 0) if t.ndim and len(t) == 1 else t.detach(),
        (call.args, call.kwargs),
    )
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            return _rows(call, args, kwargs, torch.as_tensor(queries, device=args[0].device))
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _rows(call: Call, args: tuple, kwargs: dict[str, Any], queries: Tensor) -> Rows:
    name, Q = type(call.module).__name__, len(queries)
    values, inputs, outputs, result = _run_with_free_values(call, args, kwargs)
    # The op adds this whatever the values are, such as a convolution of its input.
    offset = _run_with_free_values(call, args, kwargs, 0.0)[1].detach()
    if not result.requires_grad:
        raise ValueError(f"{name} has no attention: its output does not depend on its values")
    picked = result[torch.arange(Q, device=result.device), queries].sum()
    (reached,) = torch.autograd.grad(picked, outputs, retain_graph=True)
    if not torch.allclose(reached, reached[..., :1]):
        raise ValueError(f"{name} has no attention that can be shown: it changes what its output layer returns")
    heads, width = count_heads(call.module), inputs.shape[-1]
    leaves, reads = _run_to_the_values(call, args, kwargs)
    maps, extras, outside = [], [], []
    for head in range(heads):
        first, last = head * (width // heads), (head + 1) * (width // heads) - 1
        rows, others = (_weights(name, values, inputs, offset, reached, channel, Q) for channel in (first, last))
        for row, other in zip(rows, others, strict=True):
            if not torch.allclose(row, other, rtol=0, atol=TOLERANCE * row.abs().max().item()):
                raise ValueError(
                    f"{name} has no attention that can be shown: the channels of a head have different weights"
                )
        placed = [_place(call, row, leaves, read) for row, read in zip(rows, reads, strict=True)]
        maps.append(torch.stack([on_map for on_map, _ in placed]).sum(0))
        extras.append(torch.stack([on_extra for _, on_extra in placed]).sum(0))
        total = torch.stack([row.reshape(Q, -1).sum(1) for row in rows]).sum(0)
        outside.append(total - maps[-1].sum((1, 2)) - extras[-1].sum(1))
    return Rows(torch.stack(maps).detach(), torch.stack(extras).detach(), torch.stack(outside).detach())


def _weights(
    name: str, values: list[Tensor], inputs: Tensor, offset: Tensor, reached: Tensor, channel: int, queries: int
) -> list[Tensor]:
    """Return the weights of the values for a channel of the queries' outputs, each (..., tokens), and check them."""
    direction = torch.zeros_like(inputs)
    direction[..., channel] = reached[..., 0]
    weights = torch.autograd.grad(
        inputs, values, direction, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    weighted = sum((w * v).reshape(queries, -1).sum(1) for w, v in zip(weights, values, strict=True))
    expected = (direction * (inputs - offset)).reshape(queries, -1).sum(1)
    if not torch.allclose(torch.as_tensor(weighted), expected, rtol=0, atol=TOLERANCE * inputs.abs().max().item()):
        raise ValueError(f"{name} has no attention that can be shown: its output is not linear in its values")
    return [w.sum(-1) for w in weights]


def count_heads(module: nn.Module) -> int:
    """Return the number of heads of an attention module, or of all its parts that have heads; else 1."""
    for name in ("num_heads", "heads"):
        heads = getattr(module, name, None)
        if isinstance(heads, int):
            return heads
        if isinstance(heads, (list, tuple)):
            return sum(heads)
    return sum(getattr(part, "num_heads", 0) for part in module.modules()) or 1


def _run_with_free_values(
    call: Call, args: tuple, kwargs: dict[str, Any], factor: float = 1.0
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Run with the values multiplied by `factor`, as leaves.

    Returns:
        The values of each call of a value layer, what the output layer reads, what the output layer returns, and the
        op's output as tokens.
    """
    values: list[Tensor] = []
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def free(parts: int) -> Any:
        def hook(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
            if not output.numel():
                return None
            fixed = output.shape[-1] * (parts - 1) // parts
            values.append((factor * output[..., fixed:].detach()).requires_grad_())
            return torch.cat([output[..., :fixed].detach(), values[-1]], dim=-1)

        return hook

    def record(module: nn.Module, read: tuple, output: Tensor) -> None:
        inputs.append(read[0])
        outputs.append(output)

    def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        return torch.zeros_like(output) if output.requires_grad else None

    with ExitStack() as stack:
        hooks = [(layer, free(parts)) for layer, parts in call.value_layers] + [(call.output_layer, record)]
        hooks += [(module, drop) for module in call.module.modules() if isinstance(module, nn.Conv2d)]
        for module, hook in hooks:
            stack.enter_context(_hooked(module, hook))
        result = call.module(*args, **kwargs)
    if not values or len(inputs) != 1:
        raise ValueError(f"{type(call.module).__name__} computes its output in several steps")
    return values, inputs[0], outputs[0], _as_tokens(result)


def _run_to_the_values(call: Call, args: tuple, kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the op's inputs (map or tokens, and extra tokens), as leaves, and what its value layers read."""
    number = 2 if len(args) > 1 and call.extra and args[0].ndim == 4 else 1
    leaves = [tensor.detach().clone().requires_grad_() for tensor in args[:number]]
    reads: list[Tensor] = []
    with ExitStack() as stack:
        for layer, _ in call.value_layers:
            stack.enter_context(_hooked(layer, lambda module, inputs, output: reads.append(inputs[0])))
        call.module(*leaves, *args[number:], **kwargs)
    return leaves, [read for read in reads if read.numel()]


def _place(call: Call, row: Tensor, leaves: list[Tensor], read: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights (Q, H, W) and (Q, E) of the op's input tokens.

    Args:
        call: Call of the attention module.
        row: Weights of the tokens that the value layer reads.
        leaves: Inputs of the op.
        read: Tokens that the value layer reads, computed from the leaves.

    Raises:
        ValueError: The value layer reads neither the op's tokens nor a smaller map of them.
    """
    H, W = call.size
    # Different factors of the channels show whether the op mixes channels on the way, as a norm does.
    factors = torch.linspace(1, 2, read.shape[-1], device=row.device)
    gradients = torch.autograd.grad(
        read, leaves, row.unsqueeze(-1) * factors, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    same_width = all(gradient.shape[-1] == len(factors) for gradient in gradients)
    if same_width and all(torch.allclose(gradient, gradient[..., :1] * factors, atol=1e-6) for gradient in gradients):
        # The op only moves, repeats, pads or averages tokens, so the gradient adds the weights of a token's copies.
        tokens = _as_tokens(tuple(gradients))[..., 0]
        return tokens[:, call.extra :].unflatten(1, (H, W)), tokens[:, : call.extra]
    Q, tokens = len(leaves[0]), row.reshape(len(leaves[0]), -1)
    for factor in range(1, min(H, W) + 1):
        if not (H % factor or W % factor) and tokens.shape[1] == call.extra + H * W // factor**2:
            grid = tokens[:, call.extra :].view(Q, 1, H // factor, W // factor) / factor**2
            return F.interpolate(grid, (H, W), mode="nearest")[:, 0], tokens[:, : call.extra]
    raise ValueError(f"{type(call.module).__name__} mixes tokens before it computes values, onto no smaller map")


def _as_tokens(output: Any) -> Tensor:
    """Join a map and extra tokens: (B, H, W, C), or a tuple of it and (B, E, C), to (B, E + H * W, C)."""
    parts = list(output) if isinstance(output, tuple) else [output]
    if len(parts) > 1:
        return torch.cat([parts[1], parts[0].flatten(1, 2)], dim=1)
    x = parts[0]
    return x.flatten(1, 2) if x.ndim == 4 else x


class _hooked:
    """Context in which a forward hook is on a module."""

    def __init__(self, module: nn.Module, hook: Any):
        self.module, self.hook = module, hook

    def __enter__(self) -> None:
        self.handle = self.module.register_forward_hook(self.hook)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def all_rows(call: Call, chunk: int = 64) -> Rows:
    """Compute the attention of all tokens, extra ones first, `chunk` queries at once."""
    number = call.extra + call.size[0] * call.size[1]
    parts = [attention_rows(call, range(start, min(start + chunk, number))) for start in range(0, number, chunk)]
    return Rows(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("map", "extra", "outside")))


def distances(size: tuple[int, int], norm: float = 2.0) -> Tensor:
    """Return the distance between all tokens of a map in tokens, (H * W, H * W); `norm` inf takes the longer side."""
    places = torch.cartesian_prod(torch.arange(size[0]), torch.arange(size[1])).view(-1, 2).float()
    return torch.cdist(places, places, p=norm)
