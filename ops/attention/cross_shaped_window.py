"""Cross-shaped window attention of CSWin Transformer (Dong et al., CVPR 2022, arXiv:2107.00652).

Written after the paper and the authors' repository, microsoft/CSWin-Transformer (MIT).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import window_attention
from ops.registry import FIRST, Place, register_op
from ops.windows import from_windows, to_windows
from retinue.utils.arithmetic import padding


@register_op("cross_shaped_window")
class CrossShapedWindowAttention(nn.Module):
    """Half of the heads attend inside vertical strips of the map, the other half inside horizontal strips.

    With all heads together, a token attends to a cross of columns and rows. A depthwise convolution of the values
    inside each strip adds position. Where the last strip does not fit the map, queries, keys and values are zero-padded
    evenly on both sides; padded tokens are attended to. Cost is `split` * H * W * (H + W).

    Args:
        dim: Number of channels.
        num_heads: Number of heads. If it is odd, vertical strips get one head more; a single head is cut in two.
        place: The stage sets the default of `split`.
        split: Width of a strip in tokens, or 0 for one strip that covers the map; by default 1, 2, 7 and 0 by stage, as
            in the paper.
        qkv_bias: Give the query, key and value projections a bias; default True.
    """

    family = "local"
    renames = ((r"^attns\.(\d)\.get_v\.", r"lepe.\1."),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        split: int | None = None,
        qkv_bias: bool = True,
    ):
        super().__init__()
        split = (1, 2, 7, 0)[min(place.stage, 3)] if split is None else split
        if split < 0:
            raise ValueError(f"split must be at least 1, or 0 for the whole map, not {split}")
        if split and num_heads == 1:
            num_heads = 2
        if dim % num_heads:
            raise ValueError(f"two directions cannot share one head of {dim} channels")
        self.split = split
        self.heads = [num_heads - num_heads // 2, num_heads // 2] if split else [num_heads]
        self.dims = [heads * dim // num_heads for heads in self.heads]
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.lepe = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=width) for width in self.dims)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        strips = ((H, self.split), (self.split, W)) if self.split else ((H, W),)
        parts = self.qkv(x).unflatten(-1, (3, -1)).split(self.dims, dim=-1)  # (B, H, W, 3, channels of a direction)
        branches = zip(parts, strips, self.heads, self.lepe, strict=True)
        return self.proj(torch.cat([strip_attention(*branch) for branch in branches], dim=-1))


def strip_attention(qkv: Tensor, strip: tuple[int, int], num_heads: int, lepe: nn.Module) -> Tensor:
    """Compute attention plus a convolution of the values inside strips of one direction.

    Args:
        qkv: Queries, keys and values (B, H, W, 3, C) of the direction's heads.
        strip: Size of a strip in tokens along H and W.
        num_heads: Number of the direction's heads.
        lepe: Depthwise convolution of the values, (N, C, h, w) to the same shape.

    Returns:
        Tensor (B, H, W, C).
    """
    (H, W), (h, w) = qkv.shape[1:3], strip
    pad_h, pad_w = padding(H, h), padding(W, w)
    top, left = pad_h // 2, pad_w // 2
    if pad_h or pad_w:
        qkv = F.pad(qkv, (0, 0, 0, 0, left, pad_w - left, top, pad_h - top))
    size = qkv.shape[1:3]
    grid = (size[0] // h, size[1] // w)
    v = to_windows(qkv[:, :, :, 2], grid)
    maps = v.flatten(0, 1).unflatten(1, strip).permute(0, 3, 1, 2)  # (B * strips, C, h, w)
    position = from_windows(lepe(maps).permute(0, 2, 3, 1).reshape(v.shape), grid, size)
    out = window_attention(qkv, None, num_heads, strip) + position
    return out[:, top : top + H, left : left + W]
