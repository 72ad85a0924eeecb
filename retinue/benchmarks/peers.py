"""The attention primitives in the formulations that they are compared with.

All of a primitive take its arguments, in order, and mean the same; what one of them cannot do, its `obstacle` says.
Written after what these compute: rayleizhu/BiFormer (bi-level routing, arXiv:2303.08810), microsoft/Swin-Transformer
(arXiv:2103.14030), torch's FlexAttention (arXiv:2412.05496) and SHI-Labs/NATTEN (arXiv:2403.04690).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ops import functional, neighborhood
from ops.backend import _state as backend_state
from ops.backend import set_backend
from ops.functional import from_groups, map_attention, merge_heads, shift_mask, split_heads, to_groups
from ops.windows import from_windows, to_windows

Pair = tuple[int, int]
Attend = Callable[..., Tensor]

MASK_ENTRIES = {"cuda": 2**31, "cpu": 2**23}  # most of a dense mask between all tokens of a batch
FLEX_BLOCK = 64  # tokens: FlexAttention's own blocks divide those of a mask
FLEX_TOKENS = 2**15  # most of a map whose mask is made from all pairs of its tokens


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Let `ops.backend` be `name` for a while."""
    former = backend_state["backend"]
    set_backend(name)
    try:
        yield
    finally:
        set_backend(former)


def running(name: str, attend: Attend) -> Attend:
    """`attend` under `ops.backend=name`."""

    @functools.wraps(attend)
    def run(*args: Any) -> Tensor:
        with backend(name):
            return attend(*args)

    return run


# routed attention


def authors_routed(qkv: Tensor, index: Tensor, grid: Pair, num_heads: int, scale: float) -> Tensor:
    """As rayleizhu/BiFormer computes it."""
    size, dim = qkv.shape[1:3], qkv.shape[-1] // 3
    q, kv = (to_windows(t, grid) for t in qkv.split((dim, 2 * dim), dim=-1))
    B, P, T, C = kv.shape
    places = index.view(B, P, -1, 1, 1).expand(-1, -1, -1, T, C)
    kv = torch.gather(kv.unsqueeze(1).expand(-1, P, -1, -1, -1), 2, places).flatten(2, 3)  # (B, P, topk * T, 2C)
    q, k, v = (split_heads(t, num_heads) for t in (q, *kv.chunk(2, dim=-1)))
    weights = ((q * scale) @ k.transpose(-2, -1)).softmax(-1)
    return from_windows(merge_heads(weights @ v), grid, size)


def masked_routed(qkv: Tensor, index: Tensor, grid: Pair, num_heads: int, scale: float) -> Tensor:
    q, k, v = qkv.chunk(3, dim=-1)
    mask = functional.routing_mask(index, grid, qkv.shape[1:3], qkv.dtype)
    return map_attention(q, k, v, num_heads, scale, mask)


def routing_blocks(index: Tensor, tokens: int) -> BlockMask:
    """FlexAttention's list of the windows of `tokens` tokens that each window attends to, all of them whole."""
    B, windows, topk = index.shape
    chosen = F.pad(index, (0, windows - topk)).int().unsqueeze(1)  # (B, 1, P, P)
    count = torch.full((B, 1, windows), topk, dtype=torch.int32, device=index.device)
    return BlockMask.from_kv_blocks(torch.zeros_like(count), chosen, count, chosen, BLOCK_SIZE=tokens)


def flex_routed(qkv: Tensor, index: Tensor, grid: Pair, num_heads: int, scale: float) -> Tensor:
    """The map's tokens in order of windows, a window a block of the mask."""
    size = qkv.shape[1:3]
    windows = to_windows(qkv, grid)
    q, k, v = (split_heads(t, num_heads) for t in windows.flatten(1, 2).chunk(3, dim=-1))
    blocks = dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), FLEX_BLOCK)
    mask = routing_blocks(index, windows.shape[2])
    out: Any = compiled_flex()(q, k, v, block_mask=mask, scale=scale, kernel_options=blocks)
    return from_windows(merge_heads(out).unflatten(1, windows.shape[1:3]), grid, size)


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


# window attention


def cut_attention(
    attend: Callable[..., Tensor],
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    window: Pair,
    shift: Pair = (0, 0),
    scale: float | None = None,
    pattern: str = "window",
) -> Tensor:
    """Roll, cut into windows, `attend` in each, put together, roll back."""
    size = qkv.shape[1:3]
    if any(shift):
        qkv = qkv.roll((-shift[0], -shift[1]), dims=(1, 2))
    mask = shift_mask(size, window, shift, pattern, qkv) if any(shift) else None  # (P, 1, N, N)
    q, k, v = (split_heads(to_groups(t, window, pattern), num_heads) for t in qkv.unbind(3))  # (B, P, heads, N, D)
    out = attend(q, k, v, bias, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    out = from_groups(merge_heads(out), size, window, pattern)
    return out.roll(shift, dims=(1, 2)) if any(shift) else out


def _products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    scores = (q * scale) @ k.transpose(-2, -1)
    for added in (bias, mask):
        scores = scores if added is None else scores + added
    return scores.softmax(-1).to(v.dtype) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    added = [t for t in (bias, mask) if t is not None]
    if added:
        return functional.biased_sdpa(q, k, v, functools.reduce(torch.add, added), scale)
    out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale=scale)
    return out.unflatten(0, q.shape[:2])


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    windows = q.shape[1]

    def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score if bias is None else score + bias[h, i, j]
        return score if mask is None else score + mask[b % windows, 0, i, j]

    modified = None if bias is None and mask is None else score
    attend = compiled_flex() if q.is_cuda else flex_attention
    out: Any = attend(*(t.flatten(0, 1) for t in (q, k, v)), score_mod=modified, scale=scale)
    return out.unflatten(0, q.shape[:2])


authors_window = functools.partial(cut_attention, _products)  # as microsoft/Swin-Transformer computes it
masked_window = functools.partial(cut_attention, _sdpa)  # to which bias and shift are one mask
flex_window = functools.partial(cut_attention, _flex)  # windows as a batch


# neighbourhood attention


def seen_along(n: int, kernel: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places of the keys that each of n tokens of a side sees, and their offsets in its class: (n, kernel) both."""
    token = torch.arange(n, device=device).unsqueeze(1)
    offset, place = token % dilation, token // dilation
    length = (n - 1 - offset) // dilation + 1
    first = (place - kernel // 2).clamp(min=0).minimum(length - kernel)
    key = first + torch.arange(kernel, device=device)
    return key * dilation + offset, key - place


def bias_by_key(bias: Tensor, offsets: Sequence[Tensor], kernel: Pair) -> Tensor:
    """(heads, H * W, keys) from the table by offset."""
    y, x = (t + k - 1 for t, k in zip(offsets, kernel, strict=True))
    return bias[:, y[:, None, :, None], x[None, :, None, :]].flatten(3).flatten(1, 2)


def gathered_neighborhood(
    qkv: Tensor, bias: Tensor | None, num_heads: int, kernel: Pair, dilation: Pair = (1, 1), *rest: Any
) -> Tensor:
    """Each token's keys and values copied together."""
    (B, H, W), C = qkv.shape[:3], qkv.shape[-1] // 3
    (rows, columns), offsets = zip(*map(seen_along, (H, W), kernel, dilation, [qkv.device] * 2), strict=True)
    q, kv = qkv.split((C, 2 * C), dim=-1)
    kv = kv.index_select(1, rows.flatten()).index_select(2, columns.flatten())
    kv = kv.view(B, H, kernel[0], W, kernel[1], 2 * C).transpose(2, 3).reshape(B * H * W, -1, 2 * C)
    q, k, v = (split_heads(t, num_heads) for t in (q.reshape(-1, 1, C), *kv.chunk(2, dim=-1)))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B * H * W, heads, 1, K)
    if bias is not None:
        added = bias_by_key(bias, offsets, kernel).transpose(0, 1).unsqueeze(2)
        scores = (scores.unflatten(0, (B, -1)) + added).flatten(0, 1)
    return merge_heads(scores.softmax(-1).to(v.dtype) @ v).view(B, H, W, C)


def masked_neighborhood(
    qkv: Tensor, bias: Tensor | None, num_heads: int, kernel: Pair, dilation: Pair = (1, 1), *rest: Any
) -> Tensor:
    H, W = qkv.shape[1:3]
    (rows, columns), offsets = zip(*map(seen_along, (H, W), kernel, dilation, [qkv.device] * 2), strict=True)
    keys = (rows[:, None, :, None] * W + columns[None, :, None, :]).flatten(2).flatten(0, 1)  # (H * W, K)
    added = qkv.new_zeros(1, *keys.shape) if bias is None else bias_by_key(bias, offsets, kernel)
    mask = qkv.new_full((len(added), H * W, H * W), -torch.inf).scatter(2, keys.expand_as(added), added)
    q, k, v = qkv.chunk(3, dim=-1)
    return map_attention(q, k, v, num_heads, mask=mask)


@functools.lru_cache(maxsize=8)
def neighborhood_blocks(size: Pair, kernel: Pair, dilation: Pair, device: torch.device) -> BlockMask:
    starts = [seen_along(n, k, d, device)[0][:, 0] for n, k, d in zip(size, kernel, dilation, strict=True)]

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        there = j >= 0
        places = ((i // size[1], j // size[1]), (i % size[1], j % size[1]))
        for (query, key), start, k, d in zip(places, starts, kernel, dilation, strict=True):
            first = start[query]
            there = there & (query % d == key % d) & (key >= first) & (key < first + k * d)
        return there

    tokens = size[0] * size[1]
    return create_block_mask(seen, None, None, tokens, tokens, device=device)


def flex_neighborhood(
    qkv: Tensor, bias: Tensor | None, num_heads: int, kernel: Pair, dilation: Pair = (1, 1), *rest: Any
) -> Tensor:
    H, W = qkv.shape[1:3]
    mask = neighborhood_blocks((H, W), kernel, dilation, qkv.device)

    def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert bias is not None
        y = (j // W // dilation[0] - i // W // dilation[0]).clamp(1 - kernel[0], kernel[0] - 1) + kernel[0] - 1
        x = (j % W // dilation[1] - i % W // dilation[1]).clamp(1 - kernel[1], kernel[1] - 1) + kernel[1] - 1
        return score + bias[h, y, x]

    q, k, v = (split_heads(t.flatten(1, 2), num_heads) for t in qkv.chunk(3, dim=-1))
    attend = compiled_flex() if qkv.is_cuda else flex_attention
    out: Any = attend(q, k, v, score_mod=None if bias is None else score, block_mask=mask)
    return merge_heads(out).unflatten(1, (H, W))


def natten_neighborhood(
    qkv: Tensor, bias: Tensor | None, num_heads: int, kernel: Pair, dilation: Pair = (1, 1), *rest: Any, **options: Any
) -> Tensor:
    """NATTEN's own choice of kernels, or with `options` of another of its back ends."""
    import natten  # pyright: ignore[reportMissingImports]

    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(3)  # (B, H, W, heads, D)
    return natten.na2d(q, k, v, kernel_size=kernel, dilation=dilation, **options).flatten(-2)


# which there are


@dataclass(frozen=True)
class Formulation:
    attend: Attend
    needs: tuple[Callable[..., str | None], ...] = ()  # each says why it cannot run
    foreign: bool = False  # a compiler or a library that is not ours and may fail

    def obstacle(self, call: "Call") -> str | None:
        return next((reason for need in self.needs if (reason := need(call))), None)


@dataclass(frozen=True)
class Call:
    """What decides whether a formulation can run."""

    batch: int
    size: Pair
    device: str  # its type
    window_tokens: int = 0
    biased: bool = False


def a_mask(call: Call) -> str | None:
    entries = call.batch * (call.size[0] * call.size[1]) ** 2
    most = MASK_ENTRIES.get(call.device, 0)
    return None if entries <= most else f"its mask would have {entries:.1e} entries, more than {most:.1e}"


def cuda(call: Call) -> str | None:
    return None if call.device == "cuda" else f"it is measured on a CUDA device, not on {call.device}"


def whole_blocks(call: Call) -> str | None:
    tokens = call.window_tokens
    return f"windows of {tokens} tokens are no multiple of its {FLEX_BLOCK}" if tokens % FLEX_BLOCK else None


def few_pairs(call: Call) -> str | None:
    tokens = call.size[0] * call.size[1]
    return f"its mask of {tokens} tokens is made from all pairs" if tokens > FLEX_TOKENS else None


def natten(call: Call) -> str | None:
    return None if neighborhood.NATTEN_INSTALLED else "natten is not installed"


def no_bias(call: Call) -> str | None:
    return "it has no bias" if call.biased else None


def compiled(attend: Attend) -> Formulation:
    return Formulation(running("torch", torch.compile(attend, dynamic=False)), (cuda,), foreign=True)


FLEX_FNA = functools.partial(natten_neighborhood, backend="flex-fna", torch_compile=True)
PLAIN = "plain PyTorch"
PRIMITIVES = {  # ours, the formulation that the others' speed is told over, and others
    "routed_attention": {
        "routed_attention": Formulation(running("auto", functional.routed_attention)),
        "gather, matmul, softmax": Formulation(authors_routed),
        "index_select + SDPA": Formulation(functional.gathered_attention),
        "masked SDPA": Formulation(masked_routed, (a_mask,)),
        "FlexAttention": Formulation(flex_routed, (cuda, whole_blocks), foreign=True),
        "torch.compile": compiled(functional.routed_attention),
    },
    "window_attention": {
        "window_attention": Formulation(running("auto", functional.window_attention)),
        "cut, matmul, softmax": Formulation(authors_window),
        "cut, masked SDPA": Formulation(masked_window),
        "FlexAttention": Formulation(flex_window, (cuda,), foreign=True),
        "torch.compile": compiled(functional.window_attention),
    },
    "neighborhood_attention": {
        "neighborhood_attention": Formulation(running("auto", neighborhood.neighborhood_attention)),
        PLAIN: Formulation(running("torch", neighborhood.neighborhood_attention)),
        "gather, matmul, softmax": Formulation(gathered_neighborhood),
        "masked SDPA": Formulation(masked_neighborhood, (a_mask,)),
        "FlexAttention": Formulation(flex_neighborhood, (cuda, few_pairs), foreign=True),
        "NATTEN": Formulation(natten_neighborhood, (cuda, natten, no_bias), foreign=True),
        "NATTEN, FlexAttention": Formulation(FLEX_FNA, (cuda, natten, no_bias), foreign=True),
        "torch.compile": compiled(neighborhood.neighborhood_attention),
    },
}
