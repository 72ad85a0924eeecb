"""Fusion-window attention of KVQ: each window attends to itself and to the windows that attention ranks highest.

Paper: KVQ: Boosting Video Quality Assessment via Saliency-Guided Local Perception (CVPR 2025, arXiv:2503.10259). By
summaries of the paper; there is no public code. These choices are ours: the scale, the number of windows, the mean over
the heads, no position bias across windows, and that a window's own tokens, to which it attends anyway, are not chosen.
"""

import torch
from torch import Tensor, nn

from ops.attention.window import RelativePositionBias
from ops.functional import gathered_attention, routed_attention, split_heads
from ops.precision import at_least_float32
from ops.registry import FIRST, Place, register_op
from ops.tiles import ragged_window_attention
from ops.windows import from_windows, pad_to_multiple, to_windows

# Largest number of scores that are computed at once to rank windows
MAX_SCORES = 2**24


@register_op("saliency_window")
class SaliencyWindowAttention(nn.Module):
    """Tokens attend to their window and, in a second softmax, to the windows that attend most; the two are added.

    A window's share of another window's attention is the mean, over the other window's tokens and the heads, of the
    attention that they give to its tokens among all tokens of the map. Each window attends to the `topk` windows with
    the largest shares. Attention inside the window has a learned bias for each relative position. Windows that reach
    beyond the map hold fewer tokens. If a side of the map is not longer than the window, the window shrinks to that
    side and is not shifted along it. Cost is linear in H * W except for the ranking, which is quadratic, and with
    `select="pooled"` quadratic divided by window⁴.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The block sets the default of `shift`.
        window: Side of a window in tokens; default 7.
        topk: Number of windows that each window attends to besides itself, cut to the number of windows; default 4.
        select: Rank windows by the attention of all tokens ("exact", the default) or of the windows' mean queries and
            keys ("pooled").
        own: Let a window choose itself; default False. It is always chosen if `topk` is the number of windows.
        shift: Number of tokens by which the windows are shifted, from 0 to window - 1; by default window // 2 in every
            second block of a stage, and 0 in the others.
        bias: Learn a bias for each relative position; default True.
    """

    family = "mixed"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int = 7,
        topk: int = 4,
        select: str = "exact",
        own: bool = False,
        shift: int | None = None,
        bias: bool = True,
    ):
        super().__init__()
        shift = window // 2 * (place.block % 2) if shift is None else shift
        if not 0 <= shift < window:
            raise ValueError(f"window must be at least 1 and shift from 0 to window - 1, not {window} and {shift}")
        if topk < 1:
            raise ValueError(f"topk must be at least 1, not {topk}")
        if select not in ("exact", "pooled"):
            raise ValueError(f"select must be 'exact' or 'pooled', not {select!r}")
        self.num_heads, self.window, self.topk, self.shift = num_heads, window, topk, shift
        self.select, self.own = select, own
        self.qkv = nn.Linear(dim, 3 * dim)
        self.position = RelativePositionBias(num_heads, window) if bias else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        window, shift = self.windows(x)
        qkv = self.qkv(x)
        bias = None if self.position is None else self.position(window)
        inside = ragged_window_attention(qkv.unflatten(-1, (3, -1)), bias, self.num_heads, window, shift)
        return self.proj(inside + self.across(qkv, window, shift))

    def windows(self, x: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the size of the windows and the shift for a map (B, H, W, C)."""
        H, W = x.shape[1:3]
        window = (min(self.window, H), min(self.window, W))
        return window, (self.shift if window[0] < H else 0, self.shift if window[1] < W else 0)

    def across(self, qkv: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
        """Compute the attention to the chosen windows for queries, keys and values (B, H, W, 3C)."""
        H, W = qkv.shape[1:3]
        qkv, on_map, grid = cut(qkv, window, shift)
        with torch.no_grad():
            shares = self.rank(qkv, on_map, grid)[0]
            if not self.own:
                shares.diagonal(dim1=1, dim2=2).fill_(-1)
            index = shares.topk(min(self.topk, shares.shape[1]), dim=-1).indices
        scale = (qkv.shape[3] // (3 * self.num_heads)) ** -0.5
        if qkv.shape[1:3] == (H, W):
            out = routed_attention(qkv, index, grid, self.num_heads, scale)
        else:
            out = gathered_attention(qkv, index, grid, self.num_heads, scale, on_map)
        return out.roll(shift, dims=(1, 2))[:, :H, :W]

    def rank(self, qkv: Tensor, on_map: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return each window's shares of the windows' attention, and the attention that each token receives.

        Args:
            qkv: Queries, keys and values (B, H, W, 3C) of a map of whole windows.
            on_map: False for padded tokens, (P, L) for P windows of L tokens.
            grid: Number of windows along H and W.

        Returns:
            Tensors (B, P, P), from window to window, and (B, P, L), whose sum is the number of tokens. With
            `select="pooled"`, the second one is equal for the tokens of a window.
        """
        q, k = at_least_float32(*(to_windows(t, grid) for t in qkv.chunk(3, dim=-1)[:2]))  # (B, P, L, C)
        B, P, L, C = q.shape
        number = on_map.sum(1).to(q.dtype)
        padded = torch.zeros_like(on_map, dtype=q.dtype).masked_fill_(~on_map, -torch.inf)
        scale = (C // self.num_heads) ** -0.5
        if self.select == "pooled":
            q, k = ((t * on_map.unsqueeze(-1)).sum(2) / number.unsqueeze(-1) for t in (q, k))
            q, k = (split_heads(t, self.num_heads) for t in (q, k))
            # A window counts as often as it has tokens
            shares = (q @ k.transpose(-2, -1) * scale + number.log()).softmax(-1).mean(1)
            received = (shares * number.unsqueeze(-1)).sum(1) / number
            return shares, received.unsqueeze(-1) * on_map
        keys = split_heads(k.flatten(1, 2), self.num_heads).transpose(-2, -1)  # (B, heads, D, P * L)
        shares, received = [], q.new_zeros(B, P * L)
        chunk = max(MAX_SCORES // (B * self.num_heads * P * L**2), 1)
        for queries, rows in zip(q.split(chunk, dim=1), on_map.split(chunk), strict=True):
            scores = split_heads(queries.flatten(1, 2) * scale, self.num_heads) @ keys + padded.flatten()
            attention = scores.softmax(-1).mean(1).unflatten(1, rows.shape) * rows.unsqueeze(-1)  # (B, chunk, L, P * L)
            given = attention.sum(2)
            received = received + given.sum(1)
            shares.append(given.unflatten(2, (P, L)).sum(3) / rows.sum(1).unsqueeze(-1))
        return torch.cat(shares, dim=1), received.unflatten(1, (P, L))

    def saliency(self, x: Tensor) -> Tensor:
        """Return the attention that each token of a map (B, H, W, C) receives from all tokens, (B, H, W).

        The values of an image sum to H * W.
        """
        (H, W), (window, shift) = x.shape[1:3], self.windows(x)
        qkv, on_map, grid = cut(self.qkv(x), window, shift)
        received = self.rank(qkv, on_map, grid)[1].unsqueeze(-1)
        return from_windows(received, grid, qkv.shape[1:3]).roll(shift, dims=(1, 2))[:, :H, :W, 0]


def cut(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Pad a map (B, H, W, C) to whole windows and roll it up and left by `shift`.

    Returns:
        The map; a tensor (P, L) that is False for padded tokens of the P windows of L tokens; and the number of windows
        along H and W.
    """
    ones = torch.ones(1, *x.shape[1:3], 1, dtype=torch.bool, device=x.device)
    x, ones = (pad_to_multiple(t, window).roll((-shift[0], -shift[1]), dims=(1, 2)) for t in (x, ones))
    grid = (x.shape[1] // window[0], x.shape[2] // window[1])
    return x, to_windows(ones, grid)[0, :, :, 0], grid
