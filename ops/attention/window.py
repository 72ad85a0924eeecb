"""Shifted-window attention of Swin Transformer (Liu et al., ICCV 2021, arXiv:2103.14030).

Written after the paper and the authors' repository, microsoft/Swin-Transformer (MIT).
"""

import math

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ops.functional import window_attention
from ops.registry import FIRST, Place, register_op
from ops.softmax import SoftmaxOptions
from ops.windows import pad_to_multiple


@register_op("window")
class WindowAttention(nn.Module):
    """Tokens attend to the tokens of their window, with a learned bias for each relative position.

    The map is zero-padded on the right and at the bottom to a multiple of the window; padded tokens are attended to. If
    a side of the map is not longer than the window, the window shrinks to that side and is not shifted along it. Cost
    is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The block sets the default of `shift`.
        window: Side of a window in tokens; default 7.
        shift: Number of tokens by which the windows are shifted, from 0 to window - 1; by default window // 2 in every
            second block of a stage, and 0 in the others.
        qkv_bias: Give the query, key and value projections a bias; default True.
    """

    family = "local"
    softmax_options = True
    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor
    renames = ((r"^relative_position_index$", None),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int = 7,
        shift: int | None = None,
        qkv_bias: bool = True,
    ):
        super().__init__()
        shift = window // 2 * (place.block % 2) if shift is None else shift
        if not 0 <= shift < window:
            raise ValueError(f"window must be at least 1 and shift from 0 to window - 1, not {window} and {shift}")
        self.num_heads, self.window_size, self.shift = num_heads, (window, window), shift
        self.softmax = SoftmaxOptions(num_heads, dim // num_heads, place, window, content=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)

    def no_weight_decay(self) -> set[str]:
        return {"relative_position_bias_table"}

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        window = (min(self.window_size[0], H), min(self.window_size[1], W))
        shift = (self.shift if window[0] < H else 0, self.shift if window[1] < W else 0)
        qkv = self.qkv(pad_to_multiple(x, window)).unflatten(-1, (3, -1))
        bias, scale = self.softmax.window_options(self.bias(window), window)
        out = window_attention(qkv, bias, self.num_heads, window, shift, scale)
        return self.proj(out[:, :H, :W])

    def bias(self, window: tuple[int, int]) -> Tensor:
        """Return the bias between the tokens of a window of (h, w) tokens: (heads, h * w, h * w)."""
        return window_bias(self.relative_position_bias_table, self.relative_position_index, window)


class RelativePositionBias(nn.Module):
    """Learned bias for each relative position in a window, for ops that hold it in a module of its own.

    Args:
        num_heads: Number of heads.
        window: Side of the largest window in tokens.
    """

    relative_position_index: Tensor
    renames = ((r"^relative_position_index$", None),)

    def __init__(self, num_heads: int, window: int):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)

    def no_weight_decay(self) -> set[str]:
        return {"relative_position_bias_table"}

    def forward(self, window: tuple[int, int]) -> Tensor:
        """Return the bias between the tokens of a window of (h, w) tokens: (heads, h * w, h * w)."""
        return window_bias(self.relative_position_bias_table, self.relative_position_index, window)


def window_bias(table: Tensor, index: Tensor, window: tuple[int, int]) -> Tensor:
    """Return the bias between the tokens of a window of (h, w) tokens: (heads, h * w, h * w).

    Args:
        table: Bias of each relative position in a window of `side` tokens, ((2 * side - 1)², heads).
        index: Row of the table for each pair of tokens of such a window, (side², side²).
        window: Size (h, w) of the window, at most `side`.
    """
    (h, w), side = window, math.isqrt(len(index))
    index = index.view(side, side, side, side)[:h, :w, :h, :w].reshape(h * w, h * w)
    return table[index].permute(2, 0, 1)


def relative_position_index(window: int) -> Tensor:
    """Return the row of the bias table for each pair of tokens of a window: (window², window²)."""
    position = torch.arange(window)
    # Offset along one axis, counted from 0 to 2 * window - 2
    offset = position[:, None] - position + window - 1
    return (offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]).reshape(window**2, window**2)
