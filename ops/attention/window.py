"""Shifted-window attention of Swin Transformer (Liu et al., ICCV 2021, arXiv:2103.14030)."""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ops.functional import window_attention
from ops.registry import FIRST, Place, register_op
from ops.windows import pad_to_multiple


@register_op("window")
class WindowAttention(nn.Module):
    """Self-attention inside windows, with a learned bias for each relative position. Cost is linear in H * W.

    Zeros pad the map on the right and at the bottom until windows fit, and are attended to. Along a side that is
    not longer than the window, the window is that side and is not shifted.

    Args:
        dim, num_heads: channels and heads.
        window: side of a window in tokens.
        shift: tokens by which the windows are shifted; by default half a window in every second block of a stage.
        qkv_bias: give the query, key and value projections a bias.
    """

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
        out = window_attention(qkv, self.bias(window), self.num_heads, window, shift)
        return self.proj(out[:, :H, :W])

    def bias(self, window: tuple[int, int]) -> Tensor:
        """The bias between the tokens of a window: (heads, tokens, tokens)."""
        (h, w), side = window, self.window_size[0]
        index = self.relative_position_index.view(side, side, side, side)[:h, :w, :h, :w].reshape(h * w, h * w)
        return self.relative_position_bias_table[index].permute(2, 0, 1)


def relative_position_index(window: int) -> Tensor:
    """The row of the bias table for each pair of a window's tokens: (tokens, tokens)."""
    side = torch.arange(window)
    offset = side[:, None] - side + window - 1  # from 0 to 2 * window - 2
    return (offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]).reshape(window**2, window**2)
