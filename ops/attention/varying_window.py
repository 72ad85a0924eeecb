"""Varying window attention of VWFormer: windows of a map attend to contexts of several sizes around them.

Paper: Multi-Scale Representations by Varying Window Attention for Semantic Segmentation (Yan et al., ICLR 2024,
arXiv:2404.16573). Written after the paper and the authors' repository, https://github.com/yan-hao-tian/VW (MIT). The
paper has the attention in its decoder (`models/heads/vwformer.py`); as a token mixer it is ours.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op
from ops.windows import from_windows, to_windows
from retinue.utils.arithmetic import ceil_div, padding

# Number of windows of a map by height and width, for any size of the map.
GRID = (8, 8)
# Side of the context relative to the side of the window, for each of the decoder's three attentions.
RATIOS = (2, 4, 8)


@register_op("varying_window")
class VaryingWindowAttention(nn.Module):
    """Each of 8 x 8 windows attends to a context around it that is `ratio` times as wide and high.

    A context has as many tokens as a window: a convolution reduces each token's channels by ratio², and ratio x ratio
    positions are concatenated into one token. Beyond its borders, the map is continued with copies of its own positions
    (the paper's copy-shift padding, see `extend`). If the windows do not fit the map, it is padded by replicating its
    right and bottom borders; padded tokens are attended to. Biases stand for the decoder's batch norms, which would mix
    images. Cost is quadratic in H * W, divided by 64.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The block sets the default of `ratio`.
        ratio: Side of the context relative to the side of the window: 2, 4 or 8. By default the blocks of a stage take
            the three in turn.
    """

    family = "local"

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, ratio: int | None = None):
        super().__init__()
        ratio = RATIOS[place.block % len(RATIOS)] if ratio is None else ratio
        if ratio not in RATIOS:
            raise ValueError(f"ratio must be 2, 4 or 8, not {ratio}")
        self.ratio = ratio
        # Fewer channels than ratio² are reduced to one
        width = ceil_div(dim, ratio**2)
        self.scale = nn.Sequential(nn.Conv2d(dim, width, ratio), nn.ReLU())
        self.attn = CrossAttention(dim, num_heads, ratio**2 * width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        padded = F.pad(x.permute(0, 3, 1, 2), (0, padding(W, GRID[1]), 0, padding(H, GRID[0])), mode="replicate")
        return attend_to_contexts(padded, self.ratio, self.scale, self.attn)[:, :H, :W]


class CrossAttention(nn.Module):
    """Attention whose queries are tokens (N, T, D) and whose keys and values are a context (N, T, E).

    Args:
        dim: Number D of channels.
        num_heads: Number of heads.
        context_dim: Number E of the context's channels.
        bias: Give the output projection a bias.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int, bias: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(width, dim) for width in (dim, context_dim, context_dim))
        self.proj = nn.Linear(dim, dim, bias=bias)
        for layer in (self.q, self.k, self.v):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q(x), self.k(context), self.v(context)))
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


def attend_to_contexts(
    x: Tensor, ratio: int, scale: nn.Module, attention: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Apply an attention from each of the 8 x 8 windows of a map to its context.

    Args:
        x: Map (B, D, h, w); h and w are multiples of 8.
        ratio: Side of the context relative to the side of the window.
        scale: Convolution of `ratio` x `ratio` positions that reduces the channels for the contexts.
        attention: Function of queries (N, T, D) and contexts (N, T, E) to (N, T, D).

    Returns:
        Map (B, h, w, D).
    """
    before, after = ratio // 2 - 1, ratio // 2
    scaled = scale(F.pad(x, (before, after, before, after)))
    windows = to_windows(x.permute(0, 2, 3, 1), GRID)  # (B, 64, T, D)
    out = attention(windows.flatten(0, 1), contexts(scaled, ratio).flatten(0, 1))
    return from_windows(out.view_as(windows), GRID, x.shape[2:])


def contexts(x: Tensor, ratio: int) -> Tensor:
    """Gather the contexts of the 8 x 8 windows of a map.

    Args:
        x: Map (B, C, h, w); h and w are multiples of 8.
        ratio: Side of a context relative to the side of a window.

    Returns:
        (B, 64, tokens of a window, ratio² C).
    """
    for dim, windows in zip((2, 3), GRID, strict=True):
        x = extend(x, ratio, dim)
        window = x.shape[dim] // (windows + ratio - 1)
        # This replaces the dimension by the windows, and appends a dimension with the positions of each context.
        x = x.unfold(dim, ratio * window, window)
    x = x.unflatten(5, (-1, ratio)).unflatten(4, (-1, ratio))  # (B, C, 8, 8, rows, ratio, columns, ratio)
    x = x.permute(0, 2, 3, 4, 6, 5, 7, 1)
    return x.flatten(5).flatten(3, 4).flatten(1, 2)


def extend(x: Tensor, ratio: int, dim: int) -> Tensor:
    """Extend dimension `dim` (2 or 3) of a map by the ratio - 1 windows by which contexts reach beyond its two ends.

    Half of these windows are added at each end. They are copies of positions inside the map, the farthest of which lies
    `ratio` windows from that end; for ratio 8, they are the opposite half of the map.
    """
    length = x.shape[dim]
    window = length // GRID[dim - 2]
    added, reach = (ratio - 1) * window, ratio * window
    before, after = added - added // 2, added // 2
    first, last = x.narrow(dim, reach - before, before), x.narrow(dim, length - reach, after)
    return torch.cat((first, x, last), dim)
