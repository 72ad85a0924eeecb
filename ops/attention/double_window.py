"""Double window attention of StyleSwin (Zhang et al., CVPR 2022, arXiv:2112.10762).

Paper: StyleSwin: Transformer-based GAN for High-resolution Image Generation. Written after the paper and the authors'
repository, microsoft/StyleSwin (MIT). The authors' maps are whole windows; ragged windows are ours.
"""

import torch
from torch import Tensor, nn

from ops.attention.window import RelativePositionBias
from ops.registry import FIRST, Place, register_op
from ops.tiles import ragged_window_attention


@register_op("double_window")
class DoubleWindowAttention(nn.Module):
    """Half of the heads attend inside windows, the other half inside shifted windows, in every block.

    Each half has a learned bias for each relative position. Windows that reach beyond the map hold fewer tokens. If a
    side of the map is not longer than the window, there is no shift, and the window shrinks to the shorter side. Cost
    is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads. If it is odd, the windows that are not shifted get one head more; a single head is
            cut in two.
        window: Side of a window in tokens; default 8.
        shift: Number of tokens by which the second half's windows are shifted, from 0 to window - 1; default
            window // 2.
    """

    family = "local"
    renames = ((r"^attn_mask2$", None),)

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, window: int = 8, shift: int | None = None):
        super().__init__()
        shift = window // 2 if shift is None else shift
        if not 0 <= shift < window:
            raise ValueError(f"window must be at least 1 and shift from 0 to window - 1, not {window} and {shift}")
        if num_heads == 1:
            num_heads = 2
        if dim % num_heads:
            raise ValueError(f"two halves cannot share one head of {dim} channels")
        self.window, self.shift = window, shift
        self.heads = [num_heads - num_heads // 2, num_heads // 2]
        self.dims = [heads * dim // num_heads for heads in self.heads]
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn = nn.ModuleList(RelativePositionBias(heads, window) for heads in self.heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        side = min(self.window, *x.shape[1:3])
        shift = self.shift if min(x.shape[1:3]) > self.window else 0
        # Each half has its part of the queries, of the keys and of the values
        halves = self.qkv(x).unflatten(-1, (3, -1)).split(self.dims, dim=-1)
        out = [
            ragged_window_attention(half, bias((side, side)), heads, (side, side), (s, s))
            for half, bias, heads, s in zip(halves, self.attn, self.heads, (0, shift), strict=True)
        ]
        return self.proj(torch.cat(out, dim=-1))
