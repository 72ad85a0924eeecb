"""Neighbourhood attention on plain tensors: each token of a map attends to the tokens around it.

Dilated as by Hassani and Shi (arXiv:2209.15001), with the strides and causal sides of generalised neighbourhood
attention (Hassani et al., arXiv:2504.16922). Written after the papers and the documentation of the authors' library,
SHI-Labs/NATTEN (MIT).
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ops.backend import automatic, obstacle_to_kernels, primitive, use_triton
from ops.functional import biased_scores_attention, merge_heads, split_heads
from ops.windows import from_windows, to_windows

Pair = tuple[int, int]  # along H and along W

NATTEN_INSTALLED = find_spec("natten") is not None


@primitive
def neighborhood_attention(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    kernel: Pair,
    dilation: Pair = (1, 1),
    stride: Pair = (1, 1),
    causal: tuple[bool, bool] = (False, False),
) -> Tensor:
    """Attention from each token of a map to a neighbourhood of kernel[0] x kernel[1] tokens.

    Along a side, every `dilation`-th token is of one class, and tokens see their own class only; what follows counts
    in it. Each `stride` tokens in a row share the neighbourhood of the middle one, the right one of two. It has as
    many tokens as the kernel, kernel // 2 of them before that one, and moves inside where it would leave the map.
    Along a causal side, it ends with the last of those that share it, is cut off at the start of the map, and a token
    sees none after itself in it. A token sees another if it does along both sides.

    On a GPU, `ops.backend=auto` leaves it to NATTEN, where that is installed and there is no bias, which it lacks; the
    Triton kernels have no strides and no causal sides.

    Args:
        qkv: (B, H, W, 3C): queries, keys and values; each side has at least kernel * dilation tokens.
        bias: (heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1), added to the scores by the offset from query to key.
        stride: from 1 to the kernel.

    Returns:
        (B, H, W, C).
    """
    if bias is None and (na2d := natten_na2d(qkv, num_heads, kernel)):
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(3)  # (B, H, W, heads, D)
        return na2d(q, k, v, kernel_size=kernel, stride=stride, dilation=dilation, is_causal=causal).flatten(-2)
    if use_triton("neighborhood_attention", obstacle(qkv, num_heads, stride, causal)):
        from ops.kernels.neighborhood_attention import neighborhood_attention as kernels

        return kernels(qkv, bias, num_heads, kernel, dilation)
    return tiled_attention(qkv, bias, num_heads, kernel, dilation, stride, causal)


def obstacle(qkv: Tensor, num_heads: int, stride: Pair, causal: tuple[bool, bool]) -> str | None:
    """What keeps the Triton kernels from running; None: nothing does."""
    if reason := obstacle_to_kernels(qkv, qkv.shape[-1] // (3 * num_heads)):
        return reason
    if max(stride) > 1:
        return f"it takes strides of 1, not {stride[0]} x {stride[1]}"
    return "it takes no causal sides" if any(causal) else None


def natten_na2d(qkv: Tensor, num_heads: int, kernel: Pair) -> Callable[..., Tensor] | None:
    """NATTEN's attention without a bias, where it is to be used: it is installed with its own kernels, and they fit."""
    fits = qkv.shape[-1] // (3 * num_heads) % 8 == 0 and min(kernel) > 1
    if not NATTEN_INSTALLED or not automatic() or not qkv.is_cuda or not fits:
        return None
    import natten  # pyright: ignore[reportMissingImports]

    return natten.na2d if natten.HAS_LIBNATTEN else None


def tiled_attention(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    kernel: Pair,
    dilation: Pair,
    stride: Pair,
    causal: tuple[bool, bool],
) -> Tensor:
    """`neighborhood_attention` in plain PyTorch.

    Queries are taken together in tiles and the box around what a tile sees is masked: up to four times as many pairs
    are multiplied as are seen, and yet several times quicker than each query's neighbourhood is copied; the copies
    are a small multiple of the map. On the meta device, on which operations are counted, a tile is no larger than a
    stride, which leaves the pairs that are seen.
    """
    at_once = stride if qkv.is_meta else kernel
    rows, columns = (
        tiles_of_side(n, kernel[i], dilation[i], stride[i], causal[i], at_once[i], qkv.device)
        for i, n in enumerate(qkv.shape[1:3])
    )
    seen = rows.seen[:, None, :, None, :, None] & columns.seen[:, None, :, None]  # (tiles, tiles, T, T, K, K)
    mask = torch.zeros_like(seen, dtype=qkv.dtype).masked_fill_(~seen, -torch.inf)
    mask = mask.flatten(4).flatten(2, 3).flatten(0, 1).unsqueeze(1)  # (P, 1, T * T, K * K)
    if bias is not None:
        table = bias.index_select(2, columns.offsets.flatten() + kernel[1] - 1)
        table = table.index_select(1, rows.offsets.flatten() + kernel[0] - 1)
        table = table.unflatten(2, columns.offsets.shape).unflatten(1, rows.offsets.shape)
        mask = mask + table.permute(1, 4, 0, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(0, 1)

    q, k, v = qkv.chunk(3, dim=-1)
    q = split_heads(tiled(q, rows.queries, columns.queries), num_heads)  # (B, P, heads, T * T, D)
    k, v = (split_heads(tiled(t, rows.keys, columns.keys), num_heads) for t in (k, v))
    out = biased_scores_attention(q, k, v, mask, q.shape[-1] ** -0.5)
    grid, size = (len(rows.queries), len(columns.queries)), (rows.queries.numel(), columns.queries.numel())
    return from_windows(merge_heads(out), grid, size).index_select(1, rows.order).index_select(2, columns.order)


class Tiles(NamedTuple):
    """Tiles of the queries of one side of a map."""

    queries: Tensor  # (tiles, T): places in the map
    keys: Tensor  # (tiles, K): places of those that the tile's queries see, and of more
    seen: Tensor  # (tiles, T, K): whether a query sees a key
    offsets: Tensor  # (tiles, T, K): from query to key in their class, where it is seen
    order: Tensor  # (n,): where each place is among all tiles' queries


def tiles_of_side(
    n: int, kernel: int, dilation: int, stride: int, causal: bool, at_once: int, device: torch.device
) -> Tiles:
    """`neighborhood_attention`'s rule on a side of n tokens, by even tiles of about `at_once` queries."""
    longest = -(-n // dilation)  # class
    even = -(-longest // -(-longest // at_once))
    at_once = -(-even // stride) * stride
    tiles = -(-longest // at_once)  # of a class
    box = min(at_once - stride + kernel, longest)

    number = torch.arange(dilation * tiles, device=device).unsqueeze(1)
    offset = number // tiles  # of the tile's class
    length = (n - 1 - offset) // dilation + 1
    query = number % tiles * at_once + torch.arange(at_once, device=device)
    query = query.minimum(length - 1)  # beyond the end of the class, its last is repeated
    first = query // stride * stride  # of those that share a neighbourhood
    if causal:
        start = (first + stride).minimum(length) - kernel
    else:
        middle = (first + stride // 2).minimum(length - 1)
        start = (middle - kernel // 2).clamp(min=0).minimum(length - kernel)
    key = start[:, :1].minimum(length - box).clamp(min=0) + torch.arange(box, device=device)

    start, offsets = start.unsqueeze(2), key.unsqueeze(1) - query.unsqueeze(2)
    seen = (key.unsqueeze(1) >= start) & (key.unsqueeze(1) < start + kernel)
    if causal:
        seen = seen & (offsets <= 0)
    place = torch.arange(n, device=device)
    return Tiles(
        query * dilation + offset,
        key.minimum(length - 1) * dilation + offset,
        seen,
        offsets.clamp(1 - kernel, kernel - 1),
        place % dilation * tiles * at_once + place // dilation,
    )


def tiled(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The tokens of (B, H, W, C) at the given places of each tile, (tiles, T): (B, P, T * T, C)."""
    x = x.index_select(1, rows.flatten()).index_select(2, columns.flatten())
    return to_windows(x, (len(rows), len(columns)))
