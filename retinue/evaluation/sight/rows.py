"""Attention of any op whose sums are linear in its values: exact rows of the matrix from keys to a query.

The attention of a query is the derivative of the op's weighted sums by the values, while queries and keys are held
fixed. One backward pass for each head finds it on the image, whatever windows, routes, neighbourhoods or agents lie
between, and without the op's help. For each row we check the definition itself: the values, weighted by the row, are
the op's sums.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ops.weighting import Values, WeightedSums
from retinue.evaluation.sight.attention import Call, count_heads, output_layers, refusal, value_layers
from retinue.evaluation.sight.placement import make_placement

# Largest difference between an output and the weighted values, relative to the largest output.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Rows:
    """Attention of Q queries.

    Attributes:
        map: Weights of the map's tokens, (heads, Q, H, W).
        extra: Weights of extra tokens, (heads, Q, E).
        outside: Weights of padding and of learned tokens, (heads, Q).
    """

    map: Tensor
    extra: Tensor
    outside: Tensor


@dataclass(frozen=True)
class _Value:
    """Values of one call of a value layer or of a mark.

    Attributes:
        free: The values, of which the sums are a function, (B, ..., D).
        read: Tokens of which each value is a function; they are a function of the op's input.
        tokens: Tokens that the values are copies of, or for which they stand, or None.
        by_head: The values are (B, heads, N, D) of tokens (B, N, C).
    """

    free: Tensor
    read: Tensor
    tokens: Tensor | None = None
    by_head: bool = False


@dataclass(frozen=True)
class _Run:
    """Run with free values: the values, and the sums of each call of an output layer or a mark."""

    values: list[_Value]
    sums: list[Tensor]


def attention_rows(call: Call, queries: Sequence[int]) -> Rows:
    """Compute the attention of some queries in each head.

    Convolutions of the values, which ops add as a positional term, do not count as attention.

    Args:
        call: Call of the attention module.
        queries: Indices of tokens in the order of extra tokens and map.

    Raises:
        ValueError: The module has no attention, or its sums are not linear in its values, or it mixes tokens before it
            computes values.
    """
    reason = refusal(call.attention)
    if reason is not None:
        raise ValueError(f"{type(call.attention).__name__} has no attention: {reason}")
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


def all_rows(call: Call, chunk: int = 64) -> Rows:
    """Compute the attention of all tokens, extra ones first, `chunk` queries at once."""
    number = call.extra + call.size[0] * call.size[1]
    parts = [attention_rows(call, range(start, min(start + chunk, number))) for start in range(0, number, chunk)]
    return Rows(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("map", "extra", "outside")))


def _rows(call: Call, args: tuple, kwargs: dict[str, Any], queries: Tensor) -> Rows:
    name, Q = type(call.attention).__name__, len(queries)
    run = _run_with_free_values(call, args, kwargs)
    # The op adds this whatever the values are, such as a convolution of its input.
    offsets = [sums.detach() for sums in _run_with_free_values(call, args, kwargs, 0.0).sums]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in args[: 2 if _takes_extra(call, args) else 1]]
    reads = _run_with_free_values(call, (*leaves, *args[len(leaves) :]), kwargs, drop=False).values
    places = [make_placement(name, call.size, leaves, value.read, value.tokens) for value in reads]
    maps, extras, outside = [], [], []
    for sums, offset, found in zip(run.sums, offsets, _find_queries(call, args, kwargs, queries), strict=True):
        if not sums.requires_grad:
            raise ValueError(f"{name} has no attention: its values do not reach its output but by convolutions")
        heads = _count_heads(call, sums, len(run.sums))
        for head in range(heads):
            rows = _head_rows(call, run.values, sums - offset, found, head, sums.shape[-1] // heads, Q)
            placed = [place(row) for row, place in zip(rows, places, strict=True)]
            maps.append(torch.stack([on_map for on_map, _ in placed]).sum(0))
            extras.append(torch.stack([on_extra for _, on_extra in placed]).sum(0))
            total = torch.stack([row.reshape(Q, -1).sum(1) for row in rows]).sum(0)
            outside.append(total - maps[-1].sum((1, 2)) - extras[-1].sum(1))
    return Rows(torch.stack(maps).detach(), torch.stack(extras).detach(), torch.stack(outside).detach())


def _takes_extra(call: Call, args: tuple) -> bool:
    return len(args) > 1 and call.extra > 0 and args[0].ndim == 4


def _by_channel(call: Call) -> bool:
    return any(isinstance(layer, WeightedSums) and layer.by_channel for layer in output_layers(call.attention))


def _count_heads(call: Call, sums: Tensor, calls: int) -> int:
    """Return the number of heads among the channels of an op's sums, of which there are those of several calls."""
    heads = count_heads(call.attention)
    return heads if calls == 1 else max(sums.shape[-1] * heads // call.args[0].shape[-1], 1)


def _head_rows(
    call: Call, values: list[_Value], sums: Tensor, found: Tensor, head: int, width: int, queries: int
) -> list[Tensor]:
    """Return the weights of the values for the queries in a head of `width` channels, and check them.

    Args:
        call: Call of the attention module.
        values: The free values.
        sums: The weighted sums (..., C).
        found: What the sums at each place count for the queries, (...).
        head: Index of the head.
        width: Number of channels of a head.
        queries: Number of queries.

    Returns:
        For each of the values, weights (..., tokens).
    """
    name, free = type(call.attention).__name__, [value.free for value in values]
    tolerance = TOLERANCE * sums.abs().max().item()

    def weigh(first: int, last: int) -> list[Tensor]:
        direction = torch.zeros_like(sums)
        direction[..., first:last] = found.unsqueeze(-1)
        weights = torch.autograd.grad(
            sums, free, direction, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        weighted = sum((w * v).reshape(queries, -1).sum(1) for w, v in zip(weights, free, strict=True))
        expected = (direction * sums).reshape(queries, -1).sum(1)
        if not torch.allclose(torch.as_tensor(weighted), expected, rtol=0, atol=tolerance * (last - first)):
            raise ValueError(f"{name} has no attention that can be shown: its sums are not linear in its values")
        rows = [w.sum(-1) / (last - first) for w in weights]
        return [row.sum(1) if value.by_head else row for row, value in zip(rows, values, strict=True)]

    start, end = head * width, (head + 1) * width
    if _by_channel(call):
        return weigh(start, end)
    rows = weigh(start, start + 1)
    for row, other in zip(rows, weigh(end - 1, end), strict=True):
        if not torch.allclose(row, other, rtol=0, atol=TOLERANCE * row.abs().max().item()):
            raise ValueError(
                f"{name} has no attention that can be shown: the channels of a head have different weights"
            )
    return rows


def _run_with_free_values(
    call: Call, args: tuple, kwargs: dict[str, Any], factor: float = 1.0, drop: bool = True
) -> _Run:
    """Run with the values multiplied by `factor`, as leaves; `drop` leaves out convolutions of the values."""
    values: list[_Value] = []
    sums: list[Tensor] = []

    def free_part(width: int) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
            if not output.numel():
                return None
            fixed, part = output.detach().split((output.shape[-1] - width, width), dim=-1)
            values.append(_Value((factor * part).requires_grad_(), inputs[0]))
            return torch.cat([fixed, values[-1].free], dim=-1)

        return hook

    def free_mark(mark: Any, inputs: tuple, output: Tensor) -> Tensor:
        read = output.transpose(1, 2).flatten(2) if mark.by_head else output
        tokens = inputs[1] if len(inputs) > 1 else None
        values.append(_Value((factor * output.detach()).requires_grad_(), read, tokens, mark.by_head))
        return values[-1].free

    def drop_convolution(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        return torch.zeros_like(output) if _depends(inputs[0], [value.free for value in values]) else None

    attention = call.attention
    marks = [part for part in attention.modules() if isinstance(part, Values)]
    hooks: list[tuple[nn.Module, Any]] = [(mark, free_mark) for mark in marks]
    if not marks or hasattr(attention, "value_layers"):
        layers = value_layers(attention) or [found for part in attention.children() for found in value_layers(part)]
        hooks += [(layer, free_part(width)) for layer, width in layers]
    hooks += [(layer, lambda module, inputs, output: sums.append(inputs[0])) for layer in output_layers(attention)]
    if drop:
        hooks += [(module, drop_convolution) for module in attention.modules() if isinstance(module, nn.Conv2d)]
    _run(call, args, kwargs, hooks)
    if not values or not sums:
        raise ValueError(f"{type(attention).__name__} has no attention in this form: it computes no values")
    return _Run(values, sums)


def _depends(x: Tensor, values: list[Tensor]) -> bool:
    """Tell whether a tensor has a gradient by the values that is not 0."""
    if not (x.requires_grad and values):
        return False
    gradients = torch.autograd.grad(x, values, torch.rand_like(x), retain_graph=True, allow_unused=True)
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def _find_queries(call: Call, args: tuple, kwargs: dict[str, Any], queries: Tensor) -> list[Tensor]:
    """Return what the sums at each place count for the queries' outputs, (...) for each call's sums (..., C)."""
    name, Q = type(call.attention).__name__, len(queries)
    outputs: list[Tensor] = []

    def cut(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    result = _as_tokens(_run(call, args, kwargs, [(layer, cut) for layer in output_layers(call.attention)]))
    picked = result[torch.arange(Q, device=result.device), queries]
    # With different factors of the channels, a norm that follows has a gradient.
    factors = torch.linspace(1, 2, picked.shape[-1], device=picked.device, dtype=picked.dtype)
    gradients = torch.autograd.grad((picked * factors).sum(), outputs, allow_unused=True, materialize_grads=True)
    found = []
    for gradient in gradients:
        used = gradient.abs().amax(-1) > 0
        if (used.reshape(Q, -1).sum(1) == 1).all():
            found.append(used.to(gradient.dtype))
        elif gradient.shape[-1] == len(factors) and torch.allclose(gradient, gradient[..., :1] * factors, atol=1e-6):
            # The op averages the sums of several windows or clusters.
            found.append(gradient[..., 0])
        elif gradient.ndim == 4 and gradient.shape[1] <= call.size[0] and gradient.shape[2] <= call.size[1]:
            found.append(_cell(call, queries, gradient.shape[1:3]).to(gradient.dtype))
        else:
            raise ValueError(f"{name} has no attention that can be shown: it mixes its sums of several tokens")
    return found


def _cell(call: Call, queries: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps (Q, h, w) with a 1 in the cell that holds each query."""
    (H, W), place = call.size, queries - call.extra
    cells = torch.zeros(len(queries), *size, device=queries.device)
    cells[torch.arange(len(queries)), place // W * size[0] // H, place % W * size[1] // W] = 1
    return cells


def _run(call: Call, args: tuple, kwargs: dict[str, Any], hooks: Sequence[tuple[nn.Module, Any]]) -> Any:
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        return call.module(*args, **kwargs)


def _as_tokens(output: Any) -> Tensor:
    """Join a map and extra tokens: (B, H, W, C), or a tuple of it and (B, E, C), to (B, E + H * W, C)."""
    parts = list(output) if isinstance(output, (tuple, list)) else [output]
    if len(parts) > 1:
        return torch.cat([parts[1], parts[0].flatten(1, 2)], dim=1)
    x = parts[0]
    return x.flatten(1, 2) if x.ndim == 4 else x


def distances(size: tuple[int, int], norm: float = 2.0) -> Tensor:
    """Return the distance between all tokens of a map in tokens, (H * W, H * W); `norm` inf takes the longer side."""
    places = torch.cartesian_prod(torch.arange(size[0]), torch.arange(size[1])).view(-1, 2).float()
    return torch.cdist(places, places, p=norm)
