"""Neighbourhood attention as a primitive: each token of a map attends to the tokens around it.

Neighbourhoods (Hassani et al., CVPR 2023, arXiv:2204.07143) can be dilated (Hassani and Shi, arXiv:2209.15001), strided
and causal (generalised neighbourhood attention, Hassani et al., arXiv:2504.16922). Written after the papers and the
documentation of the authors' library, SHI-Labs/NATTEN (MIT).
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from ops.backend import automatic, obstacle_to_kernels, primitive, use_triton
from ops.tiles import QueryTiles, attend_in_tiles, relative_bias
from retinue.utils.arithmetic import ceil_div, round_up

# One number along H and one along W
Pair = tuple[int, int]

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
    """Compute attention from each token of a map to a neighbourhood of kernel[0] x kernel[1] tokens.

    Neighbourhoods are defined along each side alone; a query attends to a key if it does so along both sides. Along a
    side, the positions with the same residue modulo `dilation` form a dilation group. A neighbourhood lies inside one
    dilation group, and the following rules count positions within the group.

    - Each `stride` consecutive queries share one neighbourhood. Its centre is the middle one of these queries, or the
      right one of two in the middle.
    - The neighbourhood holds `kernel` tokens, `kernel // 2` of them before its centre. Where it would leave the map, it
      is moved inside.
    - Along a causal side, the neighbourhood ends with the last of the queries that share it instead, it is cut off at
      the start of the map, and a query attends to no token after itself.

    On a GPU, `ops.backend=auto` calls NATTEN if it is installed and there is no bias, which NATTEN does not support.
    The Triton kernels support neither strides nor causal sides.

    Args:
        qkv: Queries, keys and values (B, H, W, 3C); each side has at least kernel * dilation tokens.
        bias: Added to the scores by the offset from query to key: (heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1), or
            None.
        num_heads: Number of heads.
        kernel: Size of the neighbourhood along H and W.
        dilation: Distance between adjacent tokens of a neighbourhood along H and W.
        stride: Number of consecutive queries along H and W that share a neighbourhood, from 1 to `kernel`.
        causal: Make H, W or both causal.

    Returns:
        Tensor (B, H, W, C).

    Raises:
        ValueError: `ops.backend=triton` was chosen and the kernels cannot run.
    """
    if bias is None and (na2d := natten_na2d(qkv, num_heads, kernel)):
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(3)  # (B, H, W, heads, D)
        return na2d(q, k, v, kernel_size=kernel, stride=stride, dilation=dilation, is_causal=causal).flatten(-2)
    if use_triton("neighborhood_attention", obstacle_to_neighborhood_kernels(qkv, num_heads, stride, causal)):
        from ops.kernels.neighborhood_attention import neighborhood_attention as triton_attention

        return triton_attention(qkv, bias, num_heads, kernel, dilation)
    return tiled_attention(qkv, bias, num_heads, kernel, dilation, stride, causal)


def obstacle_to_neighborhood_kernels(
    qkv: Tensor, num_heads: int, stride: Pair, causal: tuple[bool, bool]
) -> str | None:
    """Return the reason why the Triton kernels cannot run, or None if they can."""
    if reason := obstacle_to_kernels(qkv, qkv.shape[-1] // (3 * num_heads)):
        return reason
    if max(stride) > 1:
        return f"it takes strides of 1, not {stride[0]} x {stride[1]}"
    return "it takes no causal sides" if any(causal) else None


def natten_na2d(qkv: Tensor, num_heads: int, kernel: Pair) -> Callable[..., Tensor] | None:
    """Return NATTEN's attention without a bias if it is to be used, else None.

    It is used on a GPU with `ops.backend=auto`, if NATTEN is installed with its compiled kernels and these support the
    size of the heads (a multiple of 8 channels) and of the neighbourhood (more than 1 token along each side).
    """
    supported = qkv.shape[-1] // (3 * num_heads) % 8 == 0 and min(kernel) > 1
    if not NATTEN_INSTALLED or not automatic() or not qkv.is_cuda or not supported:
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
    shared: Tensor | None = None,
) -> Tensor:
    """Compute `neighborhood_attention` in plain PyTorch; the arguments are the same.

    All queries also attend to `shared` keys and values (B, 1, M, 2C), in the same softmax.

    The map is cut into tiles of queries. The queries of a tile attend together to the box that holds all of their
    neighbourhoods, with a mask on the keys outside each query's neighbourhood. This multiplies up to four times as many
    pairs of query and key as attend to each other, but is several times faster than copying the neighbourhood of each
    query, and the copies that it makes are a small multiple of the map. On the meta device, where operations are
    counted, a tile is no larger than a stride, so that only the pairs that attend to each other are counted.
    """
    tile = stride if qkv.is_meta else kernel
    rows, columns = (
        tiles_of_side(n, kernel[i], dilation[i], stride[i], causal[i], tile[i], qkv.device)
        for i, n in enumerate(qkv.shape[1:3])
    )
    table = None if bias is None else relative_bias(bias, rows, columns)
    return attend_in_tiles(qkv, num_heads, rows, columns, bias=table, shared=shared)


def tiles_of_side(
    n: int, kernel: int, dilation: int, stride: int, causal: bool, tile: int, device: torch.device
) -> QueryTiles:
    """Apply the rules of `neighborhood_attention` to one side of a map, cut into tiles.

    Args:
        n: Number of tokens along the side.
        kernel: Size of the neighbourhood.
        dilation: Distance between adjacent tokens of a neighbourhood.
        stride: Number of consecutive queries that share a neighbourhood.
        causal: Make the side causal.
        tile: Preferred number of queries in a tile. It is adjusted so that the tiles of the longest dilation group are
            of about equal size, and rounded up to a multiple of `stride`.
        device: Device of the result.
    """
    longest_group = ceil_div(n, dilation)
    queries_per_tile = round_up(ceil_div(longest_group, ceil_div(longest_group, tile)), stride)
    tiles_per_group = ceil_div(longest_group, queries_per_tile)
    box = min(queries_per_tile - stride + kernel, longest_group)

    # Query, key and start count positions within the dilation group of each tile, and have a row for each tile
    number = torch.arange(dilation * tiles_per_group, device=device).unsqueeze(1)
    residue = number // tiles_per_group
    length = (n - 1 - residue) // dilation + 1
    query = number % tiles_per_group * queries_per_tile + torch.arange(queries_per_tile, device=device)
    # Beyond the end of the group, its last query is repeated
    query = query.minimum(length - 1)
    # The first of the queries that share the query's neighbourhood
    first = query // stride * stride
    if causal:
        start = (first + stride).minimum(length) - kernel
    else:
        centre = (first + stride // 2).minimum(length - 1)
        start = (centre - kernel // 2).clamp(min=0).minimum(length - kernel)
    key = start[:, :1].minimum(length - box).clamp(min=0) + torch.arange(box, device=device)

    start, offsets = start.unsqueeze(2), key.unsqueeze(1) - query.unsqueeze(2)
    attended = (key.unsqueeze(1) >= start) & (key.unsqueeze(1) < start + kernel)
    if causal:
        attended = attended & (offsets <= 0)
    position = torch.arange(n, device=device)
    return QueryTiles(
        query * dilation + residue,
        key.minimum(length - 1) * dilation + residue,
        attended,
        offsets.clamp(1 - kernel, kernel - 1),
        position % dilation * tiles_per_group * queries_per_tile + position // dilation,
    )
