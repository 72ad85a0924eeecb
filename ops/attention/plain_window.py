"""Window attention of DaViT (Ding et al., ECCV 2022, arXiv:2204.03645), without positions."""

import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op
from ops.windows import from_windows, pad_to_multiple, to_windows


@register_op("plain_window")
class PlainWindowAttention(nn.Module):
    """Self-attention inside windows that are not shifted, as if their tokens had no order. Cost is linear in H * W.

    Zeros pad the map on the right and at the bottom to whole windows, and are attended to.

    Args:
        dim, num_heads: channels and heads.
        window: side of a window in tokens.
        qkv_bias: give the query, key and value projections a bias.
    """

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, window: int = 7, qkv_bias: bool = True):
        super().__init__()
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        self.num_heads, self.window = num_heads, window
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        x = pad_to_multiple(x, (self.window, self.window))
        size = x.shape[1:3]
        grid = (size[0] // self.window, size[1] // self.window)
        qkv = self.qkv(to_windows(x, grid).flatten(0, 1))  # (B * windows, tokens, 3C)
        q, k, v = (split_heads(t, self.num_heads) for t in qkv.chunk(3, dim=-1))
        out = merge_heads(F.scaled_dot_product_attention(q, k, v))
        out = from_windows(out.unflatten(0, (B, -1)), grid, size)
        return self.proj(out[:, :H, :W])
