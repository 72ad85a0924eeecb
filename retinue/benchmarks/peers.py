"""Other formulations of the attention primitives, which ours are compared with.

Every function here takes the arguments of a primitive in the same order and has its meaning. Each docstring says whose
formulation it is: that of rayleizhu/BiFormer (bi-level routing, arXiv:2303.08810), of microsoft/Swin-Transformer
(arXiv:2103.14030), of torch's FlexAttention (arXiv:2412.05496) or of SHI-Labs/NATTEN (arXiv:2403.04690), or one written
for this comparison. All but NATTEN's are our code, written after what these projects compute.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ops.functional import (
    biased_sdpa,
    from_groups,
    map_attention,
    merge_heads,
    routing_mask,
    shift_mask,
    split_heads,
    to_groups,
)
from ops.linear import map_features
from ops.windows import from_windows, to_windows
from retinue.benchmarks.options import Pair

# Tokens of a block of FlexAttention's kernels. They divide the blocks of a mask, which are whole windows.
FLEX_BLOCK = 64


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    """Return FlexAttention through torch.compile: without it, FlexAttention keeps all scores."""
    return torch.compile(flex_attention, dynamic=False)


# Routed attention


def authors_routed(qkv: Tensor, index: Tensor, grid: Pair, num_heads: int, scale: float) -> Tensor:
    """Compute `routed_attention` as rayleizhu/BiFormer does: gather keys and values, matrix products, softmax."""
    size, dim = qkv.shape[1:3], qkv.shape[-1] // 3
    q, kv = (to_windows(t, grid) for t in qkv.split((dim, 2 * dim), dim=-1))
    B, P, T, C = kv.shape
    gather_index = index.view(B, P, -1, 1, 1).expand(-1, -1, -1, T, C)
    kv = torch.gather(kv.unsqueeze(1).expand(-1, P, -1, -1, -1), 2, gather_index).flatten(2, 3)  # (B, P, topk * T, 2C)
    q, k, v = (split_heads(t, num_heads) for t in (q, *kv.chunk(2, dim=-1)))
    weights = ((q * scale) @ k.transpose(-2, -1)).softmax(-1)
    return from_windows(merge_heads(weights @ v), grid, size)


def masked_routed(qkv: Tensor, index: Tensor, grid: Pair, num_heads: int, scale: float) -> Tensor:
    """Compute `routed_attention` by torch's SDPA with a dense mask; written for this comparison."""
    q, k, v = qkv.chunk(3, dim=-1)
    return map_attention(q, k, v, num_heads, scale, routing_mask(index, grid, qkv.shape[1:3], qkv.dtype))


def routing_blocks(index: Tensor, tokens: int) -> BlockMask:
    """Return FlexAttention's mask in which every window attends to whole windows.

    Args:
        index: (B, P, topk), the windows that each of P windows attends to.
        tokens: tokens of a window, which is one block of the mask.
    """
    B, windows, topk = index.shape
    chosen = F.pad(index, (0, windows - topk)).int().unsqueeze(1)  # (B, 1, P, P)
    count = torch.full((B, 1, windows), topk, dtype=torch.int32, device=index.device)
    return BlockMask.from_kv_blocks(torch.zeros_like(count), chosen, count, chosen, BLOCK_SIZE=tokens)


def flex_routed(qkv: Tensor, index: Tensor, grid: Pair, num_heads: int, scale: float) -> Tensor:
    """Compute `routed_attention` by torch's FlexAttention.

    Tokens are reordered window by window, so that a window is a block of the mask.
    """
    size = qkv.shape[1:3]
    windows = to_windows(qkv, grid)
    q, k, v = (split_heads(t, num_heads) for t in windows.flatten(1, 2).chunk(3, dim=-1))
    blocks = dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), FLEX_BLOCK)
    mask = routing_blocks(index, windows.shape[2])
    out: Any = compiled_flex()(q, k, v, block_mask=mask, scale=scale, kernel_options=blocks)
    return from_windows(merge_heads(out).unflatten(1, windows.shape[1:3]), grid, size)


# Window attention


def windowed_attention(
    attend: Callable[..., Tensor],
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    window: Pair,
    shift: Pair = (0, 0),
    scale: float | None = None,
    pattern: str = "window",
) -> Tensor:
    """Compute `window_attention` by copies: shift the map, cut it into windows, attend, and undo both.

    `attend` takes queries, keys and values (B, P, heads, N, D), the bias (heads, N, N) or None, the mask of the shift
    (P, 1, N, N) or None, and the scale, and returns (B, P, heads, N, D). All further arguments are those of
    `window_attention`.
    """
    size = qkv.shape[1:3]
    if any(shift):
        qkv = qkv.roll((-shift[0], -shift[1]), dims=(1, 2))
    mask = shift_mask(size, window, shift, pattern, qkv) if any(shift) else None  # (P, 1, N, N)
    q, k, v = (split_heads(to_groups(t, window, pattern), num_heads) for t in qkv.unbind(3))  # (B, P, heads, N, D)
    out = attend(q, k, v, bias, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    out = from_groups(merge_heads(out), size, window, pattern)
    return out.roll(shift, dims=(1, 2)) if any(shift) else out


def _matmul_softmax(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    scores = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(v.dtype) @ v


def _masked_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    added = [t for t in (bias, mask) if t is not None]
    if added:
        return biased_sdpa(q, k, v, functools.reduce(torch.add, added), scale)
    out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale=scale)
    return out.unflatten(0, q.shape[:2])


def _flex_batch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    windows = q.shape[1]

    def modify(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score if bias is None else score + bias[h, i, j]
        return score if mask is None else score + mask[b % windows, 0, i, j]

    modification = None if bias is None and mask is None else modify
    attend = compiled_flex() if q.is_cuda else flex_attention
    out: Any = attend(*(t.flatten(0, 1) for t in (q, k, v)), score_mod=modification, scale=scale)
    return out.unflatten(0, q.shape[:2])


# The formulation of microsoft/Swin-Transformer: matrix products and softmax in each window.
authors_window = functools.partial(windowed_attention, _matmul_softmax)
# torch's SDPA in each window, as in timm's Swin: the sum of bias and shift mask is SDPA's mask.
masked_window = functools.partial(windowed_attention, _masked_sdpa)
# torch's FlexAttention with the windows as a batch; written for this comparison.
flex_window = functools.partial(windowed_attention, _flex_batch)


# Neighbourhood attention


def neighbors_along_side(n: int, kernel_size: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the neighbourhood of each of the n tokens of a side.

    Tokens whose positions have the same remainder modulo `dilation` are a dilation group. A neighbourhood lies within
    its token's group.

    Returns:
        (n, kernel_size): positions of the neighbours;
        (n, kernel_size): their offsets from the token, counted in the tokens of the group.
    """
    token = torch.arange(n, device=device).unsqueeze(1)
    residue, position = token % dilation, token // dilation
    length = (n - 1 - residue) // dilation + 1
    first = (position - kernel_size // 2).clamp(min=0).minimum(length - kernel_size)
    neighbor = first + torch.arange(kernel_size, device=device)
    return neighbor * dilation + residue, neighbor - position


def bias_of_neighbors(bias: Tensor, offsets: Sequence[Tensor], kernel_size: Pair) -> Tensor:
    """Return the bias of each query and neighbour, (heads, H * W, K), from the table of offsets.

    Args:
        bias: (heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1).
        offsets: (H, kernel_size[0]) and (W, kernel_size[1]), from `neighbors_along_side`.
        kernel_size: K = kernel_size[0] * kernel_size[1] neighbours of a token.
    """
    y, x = (t + k - 1 for t, k in zip(offsets, kernel_size, strict=True))
    return bias[:, y[:, None, :, None], x[None, :, None, :]].flatten(3).flatten(1, 2)


def gathered_neighborhood(
    qkv: Tensor, bias: Tensor | None, num_heads: int, kernel_size: Pair, dilation: Pair = (1, 1), *others: Any
) -> Tensor:
    """Compute `neighborhood_attention` from copies of each token's neighbours; written for this comparison."""
    (B, H, W), C = qkv.shape[:3], qkv.shape[-1] // 3
    rows, row_offsets = neighbors_along_side(H, kernel_size[0], dilation[0], qkv.device)
    columns, column_offsets = neighbors_along_side(W, kernel_size[1], dilation[1], qkv.device)
    q, kv = qkv.split((C, 2 * C), dim=-1)
    kv = kv.index_select(1, rows.flatten()).index_select(2, columns.flatten())
    kv = kv.view(B, H, kernel_size[0], W, kernel_size[1], 2 * C).transpose(2, 3).reshape(B * H * W, -1, 2 * C)
    q, k, v = (split_heads(t, num_heads) for t in (q.reshape(-1, 1, C), *kv.chunk(2, dim=-1)))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B * H * W, heads, 1, K)
    if bias is not None:
        added = bias_of_neighbors(bias, (row_offsets, column_offsets), kernel_size).transpose(0, 1).unsqueeze(2)
        scores = (scores.unflatten(0, (B, -1)) + added).flatten(0, 1)
    return merge_heads(scores.softmax(-1).to(v.dtype) @ v).view(B, H, W, C)


def masked_neighborhood(
    qkv: Tensor, bias: Tensor | None, num_heads: int, kernel_size: Pair, dilation: Pair = (1, 1), *others: Any
) -> Tensor:
    """Compute `neighborhood_attention` by torch's SDPA with a dense mask; written for this comparison."""
    H, W = qkv.shape[1:3]
    rows, row_offsets = neighbors_along_side(H, kernel_size[0], dilation[0], qkv.device)
    columns, column_offsets = neighbors_along_side(W, kernel_size[1], dilation[1], qkv.device)
    keys = (rows[:, None, :, None] * W + columns[None, :, None, :]).flatten(2).flatten(0, 1)  # (H * W, K)
    if bias is None:
        added = qkv.new_zeros(1, *keys.shape)
    else:
        added = bias_of_neighbors(bias, (row_offsets, column_offsets), kernel_size)
    mask = qkv.new_full((len(added), H * W, H * W), -torch.inf).scatter(2, keys.expand_as(added), added)
    q, k, v = qkv.chunk(3, dim=-1)
    return map_attention(q, k, v, num_heads, mask=mask)


@functools.lru_cache(maxsize=8)
def neighborhood_blocks(size: Pair, kernel_size: Pair, dilation: Pair, device: torch.device) -> BlockMask:
    """Return FlexAttention's mask of the neighbourhoods of a map of size[0] x size[1] tokens."""
    starts = [
        neighbors_along_side(n, k, d, device)[0][:, 0] for n, k, d in zip(size, kernel_size, dilation, strict=True)
    ]

    def is_neighbor(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        mask = j >= 0
        positions = ((i // size[1], j // size[1]), (i % size[1], j % size[1]))
        for (query, key), start, k, d in zip(positions, starts, kernel_size, dilation, strict=True):
            first = start[query]
            mask = mask & (query % d == key % d) & (key >= first) & (key < first + k * d)
        return mask

    tokens = size[0] * size[1]
    return create_block_mask(is_neighbor, None, None, tokens, tokens, device=device)


def flex_neighborhood(
    qkv: Tensor, bias: Tensor | None, num_heads: int, kernel_size: Pair, dilation: Pair = (1, 1), *others: Any
) -> Tensor:
    """Compute `neighborhood_attention` by torch's FlexAttention, with the bias as a modification of the scores."""
    H, W = qkv.shape[1:3]
    mask = neighborhood_blocks((H, W), kernel_size, dilation, qkv.device)
    y_max, x_max = kernel_size[0] - 1, kernel_size[1] - 1

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert bias is not None
        y = (j // W // dilation[0] - i // W // dilation[0]).clamp(-y_max, y_max) + y_max
        x = (j % W // dilation[1] - i % W // dilation[1]).clamp(-x_max, x_max) + x_max
        return score + bias[h, y, x]

    q, k, v = (split_heads(t.flatten(1, 2), num_heads) for t in qkv.chunk(3, dim=-1))
    attend = compiled_flex() if qkv.is_cuda else flex_attention
    out: Any = attend(q, k, v, score_mod=None if bias is None else add_bias, block_mask=mask)
    return merge_heads(out).unflatten(1, (H, W))


def natten_neighborhood(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    kernel_size: Pair,
    dilation: Pair = (1, 1),
    *others: Any,
    **options: Any,
) -> Tensor:
    """Compute `neighborhood_attention` without a bias by SHI-Labs/NATTEN.

    `options` choose a back end of NATTEN; without them NATTEN chooses itself.
    """
    import natten  # pyright: ignore[reportMissingImports]

    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(3)  # (B, H, W, heads, D)
    return natten.na2d(q, k, v, kernel_size=kernel_size, dilation=dilation, **options).flatten(-2)


# NATTEN's back end on FlexAttention.
natten_flex_neighborhood = functools.partial(natten_neighborhood, backend="flex-fna", torch_compile=True)


# Linear attention


def quadratic_linear(
    qkv: Tensor, num_heads: int, features: str, normalization: str, scale: float, min_sum: float
) -> Tensor:
    """Compute `linear_attention` from the weights of all pairs of tokens in float32; written for this comparison."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = (split_heads(t, num_heads).to(dtype) for t in qkv.chunk(3, dim=-1))
    q, k = map_features(q, k, features)
    weights = q @ k.transpose(-2, -1)
    if normalization == "sum":
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=min_sum)
    elif normalization == "subtract":
        weights = (weights - weights.mean(-1, keepdim=True) + 1 / scale) / weights.shape[-1]
    return merge_heads(weights @ v * scale).to(qkv.dtype)
