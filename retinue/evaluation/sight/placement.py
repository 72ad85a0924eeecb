"""Placement of the weights of values on the tokens of the map from which the values are computed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from retinue.utils.arithmetic import ceil_div

# Function of weights (Q, ...) of the values to those of the map (Q, H, W) and of the extra tokens (Q, E)
Placement = Callable[[Tensor], tuple[Tensor, Tensor]]
# Smallest correlation of the places of the cells of a smaller map with those of the tokens that they are computed from
MIN_CORRELATION = 0.9


def make_placement(
    name: str, size: tuple[int, int], leaves: Sequence[Tensor], read: Tensor, tokens: Tensor | None = None
) -> Placement:
    """Return the function that places weights of values on the tokens of an op's input.

    There are three cases: the values are computed from copies or means of tokens; or each token is read into one value,
    through whatever layers; or the values are those of a smaller map, each of whose cells stands for the tokens in it.

    Args:
        name: Name of the op, for the error.
        size: Size (H, W) of the map.
        leaves: Inputs of the op: a map (Q, H, W, C) or tokens (Q, E + H * W, C), and perhaps extra tokens (Q, E, C).
        read: Tokens (Q, ..., D) that are a function of the leaves, one for each value.
        tokens: A map (Q, H, W, D) of which `read` are rearranged copies; or tokens (Q, ..., D) for which the values
            stand, one for each, in place of `read`; or None.

    Raises:
        ValueError: None of these is the case.
    """
    extra = leaves[1].shape[1] if len(leaves) > 1 else leaves[0].shape[1] - size[0] * size[1]
    extra = 0 if len(leaves) == 1 and leaves[0].ndim == 4 else extra

    def split(weights: Tensor) -> tuple[Tensor, Tensor]:
        return weights[:, extra:].unflatten(1, size), weights[:, :extra]

    sources, on_map = leaves, False
    if tokens is not None and tokens.shape[1:3] == size:
        sources, on_map = [tokens], True
    elif tokens is not None:
        read = tokens
    if _copied(read, sources, torch.ones_like(read[..., 0])) is not None:
        return lambda row: split(_copied(read, sources, row))
    index = None if on_map else _find_values(read, leaves)
    if index is None and not on_map:
        index = _find_cells(read, leaves, size, extra)
    if index is None:
        raise ValueError(f"{name} has no attention that can be shown: it mixes tokens before it computes values")
    counts = torch.zeros_like(read[..., 0]).reshape(len(index), -1)
    counts.scatter_add_(1, index.clamp_min(0), (index >= 0).to(counts.dtype))

    def share(row: Tensor) -> tuple[Tensor, Tensor]:
        # All tokens that are read into a value have an equal share of its weight.
        shares = row.reshape(counts.shape) / counts.clamp_min(1)
        return split(shares.gather(1, index.clamp_min(0)) * (index >= 0))

    return share


def _copied(read: Tensor, sources: Sequence[Tensor], row: Tensor) -> Any:
    """Return the weights of the sources' tokens (Q, tokens), or None if `read` is not made of copies and means of them.

    The gradient adds the weights of a token's copies. Different factors of the channels show whether channels are mixed
    on the way, as by a norm.
    """
    factors = torch.linspace(1, 2, read.shape[-1], device=read.device, dtype=read.dtype)
    weights = []
    for gradient in _carry_back(read, sources, row.unsqueeze(-1) * factors):
        used = gradient.abs().flatten(0, -2).amax(0) > 0
        # Each source may have further channels, of which these are no copies.
        part = gradient[..., used] if used.any() else gradient[..., : len(factors)]
        if part.shape[-1] != len(factors) or not torch.allclose(part, part[..., :1] * factors, atol=1e-6):
            return None
        weights.append(part[..., 0].flatten(1))
    return torch.cat(weights[::-1], dim=1)


def _carry_back(read: Tensor, sources: Sequence[Tensor], direction: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(read, sources, direction, retain_graph=True, allow_unused=True, materialize_grads=True)


def _read_from(read: Tensor, leaves: Sequence[Tensor], numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean number of the values into which each token is read, and whether it is read at all.

    Args:
        read: Tokens (Q, ..., D) that are a function of the leaves.
        leaves: Inputs of the op.
        numbers: A number for each of the values, (T,).

    Returns:
        Tensors (Q, tokens). A token that is read into one value has the number of this value.
    """
    factors = torch.linspace(1, 2, read.shape[-1], device=read.device, dtype=read.dtype)
    Q = len(leaves[0])

    def carry(numbers: Tensor) -> Tensor:
        direction = numbers.expand(Q, -1).reshape(read.shape[:-1]).unsqueeze(-1) * factors
        gradients = _carry_back(read, leaves, direction)
        return torch.cat([gradient.reshape(Q, -1, gradient.shape[-1]) for gradient in gradients[::-1]], dim=1)

    ones = carry(torch.ones_like(numbers))
    power = ones.square().sum(-1)
    is_read = power > 1e-12 * power.amax()
    return (carry(numbers) * ones).sum(-1) / power.clamp_min(1e-30), is_read


def _find_values(read: Tensor, leaves: Sequence[Tensor]) -> Tensor | None:
    """Return the index of the value into which each token is read, -1 for none: (Q, tokens); None if there are more."""
    T = read[..., 0].numel() // len(leaves[0])
    # In a random order, the mean of several numbers is hardly ever one of them.
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0)).to(read.device)
    mean, is_read = _read_from(read, leaves, (order.to(read.dtype) + 1) / T)
    number = mean * T - 1
    nearest = number.round()
    exact = ((number - nearest).abs() < 0.05) & (nearest >= 0) & (nearest < T)
    if not is_read.any() or not exact[is_read].all():
        return None
    return torch.where(is_read, order.argsort()[nearest.clamp(0, T - 1).long()], -1)


def _find_cells(read: Tensor, leaves: Sequence[Tensor], size: tuple[int, int], extra: int) -> Tensor | None:
    """Return the index of the cell of a smaller map in which each token lies, (Q, tokens), or None.

    There must be a smaller map (Q, h, w, D), or the last tokens of (Q, E + h * w, D) must be one by a whole factor.
    """
    Q, (H, W) = len(leaves[0]), size
    T = read[..., 0].numel() // Q
    if read.ndim == 4 and read.shape[1] <= H and read.shape[2] <= W:
        grids = [(read.shape[1], read.shape[2])]
    else:
        grids = [(ceil_div(H, f), ceil_div(W, f)) for f in range(1, max(H, W) + 1)]
        grids += [(H // f, W // f) for f in range(2, min(H, W) + 1)]
    grids = [grid for grid in grids if grid[0] * grid[1] + extra == T]
    if not grids or len(read) != Q:
        return None
    h, w = grids[0]
    rows, columns = ((torch.arange(side) * cells // side) for side, cells in ((H, h), (W, w)))
    for axis, cells in enumerate((h, w)):
        # The cells must be where the tokens are from which they are computed.
        place = torch.arange(h * w, device=read.device)
        place = place % w if axis else place.div(w, rounding_mode="floor")
        numbers = torch.cat([place.new_zeros(extra), place]).to(read.dtype)
        mean = _read_from(read, leaves, numbers)[0][:, extra:].unflatten(1, size).mean((0, 2 - axis))
        both = torch.stack([mean, torch.arange(size[axis]).to(mean)])
        if cells > 1 and not torch.corrcoef(both)[0, 1] >= MIN_CORRELATION:
            return None
    index = extra + (rows[:, None] * w + columns).flatten()
    return torch.cat([torch.arange(extra), index]).to(read.device).expand(Q, -1)
