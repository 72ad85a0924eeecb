"""Factorization self-attention of FaViT (Qin et al., TNNLS 2023, arXiv:2312.08614).

Written after the paper and what the authors' repository, q2479036243/FaViT, computes. The repository names no licence,
so nothing of it is here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op
from retinue.utils.arithmetic import ceil_div

# Ratio in each stage of the paper's nets
RATIOS = (8, 4, 2, 1)
# Side of a window in sampled tokens
WINDOW = 7


class GlobalGroup(nn.Module):
    """One head attends to a map that a strided convolution and a norm make `ratio` times smaller.

    Where patches of ratio x ratio tokens do not fit the map, the last tokens are left out. A map that is smaller than a
    patch is zero-padded to the size of a patch.

    Args:
        dim: Number of channels of the group.
        ratio: Side of the map divided by the side of the smaller map.
        qkv_bias: Give the key and value projections a bias.
    """

    def __init__(self, dim: int, ratio: int, qkv_bias: bool):
        super().__init__()
        self.ratio = ratio
        self.reduce = nn.Conv2d(dim, dim, ratio, stride=ratio)
        self.norm = nn.LayerNorm(dim)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        """Return the output (B, N, D) of the queries `q` (B, 1, N, D) on the map `x` (B, H, W, D)."""
        H, W = x.shape[1:3]
        x = F.pad(x.permute(0, 3, 1, 2), (0, max(self.ratio - W, 0), 0, max(self.ratio - H, 0)))
        k, v = self.kv(self.norm(self.reduce(x).permute(0, 2, 3, 1))).chunk(2, dim=-1)
        v = v + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        k, v = (split_heads(t.flatten(1, 2), 1) for t in (k, v))
        return merge_heads(F.scaled_dot_product_attention(q, k, v))


class LocalGroup(nn.Module):
    """All tokens attend to one window, the mean of all windows of the map, whose tokens lie `dilation` apart.

    Args:
        dim: Number of channels of the group.
        num_heads: Number of heads.
        dilation: Distance between adjacent tokens of a window.
        qkv_bias: Give the key and value projections a bias.
    """

    def __init__(self, dim: int, num_heads: int, dilation: int, qkv_bias: bool):
        super().__init__()
        self.num_heads, self.dilation = num_heads, dilation
        head_dim = dim // num_heads
        self.mix = nn.Linear(head_dim, head_dim, bias=qkv_bias)
        self.kv = nn.Linear(head_dim, 2 * head_dim, bias=qkv_bias)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        """Return the output (B, N, heads * D) of queries `q` (B, heads, N, D) on the map `x` (B, H, W, heads * D)."""
        k, v = self.kv(self.mix(self.mean_window(x))).chunk(2, dim=-1)
        lepe = self.lepe(v.transpose(2, 3).flatten(1, 2).unflatten(2, (WINDOW, WINDOW)))
        v = v + lepe.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)
        return merge_heads(F.scaled_dot_product_attention(q, k, v))

    def mean_window(self, x: Tensor) -> Tensor:
        """Return the window that is attended to, (B, heads, 7 * 7, D), from a map (B, H, W, heads * D).

        As in the authors' code, the mean is taken over consecutive values, as many as there are windows, in the order
        (windows, D). It thus averages channels of a window where it should average each channel over the windows.
        """
        rows, columns = (self.sampled_positions(side, x.device) for side in x.shape[1:3])
        x = x.index_select(1, rows).index_select(2, columns)
        x = x.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW))  # (B, rows of windows, 7, columns, 7, heads * D)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)  # (B, 7 * 7, windows, heads * D)
        x = x.unflatten(3, (self.num_heads, -1)).permute(0, 3, 1, 2, 4)  # (B, heads, 7 * 7, windows, D)
        return x.flatten(3).unflatten(3, (x.shape[4], x.shape[3])).mean(-1)

    def sampled_positions(self, side: int, device: torch.device) -> Tensor:
        """Return the positions of the tokens of all windows along an axis, window after window: (windows * 7,).

        The map is mirrored at its end, as often as necessary to fill the last window.
        """
        span = self.dilation * (WINDOW - 1) + 1
        starts = torch.arange(ceil_div(side, span), device=device) * span
        positions = starts[:, None] + torch.arange(WINDOW, device=device) * self.dilation
        period = max(2 * (side - 1), 1)
        positions = positions.flatten() % period
        return torch.minimum(positions, period - positions)


@register_op("factorization")
class FactorizationAttention(nn.Module):
    """Groups of channels attend to the map at different ranges: a coarse map, near tokens and tokens far apart.

    Of 16 parts of the channels, 2 attend to the whole map, made `ratio` times smaller; 7 attend to a window of 7 x 7
    adjacent tokens, and 7 to a window of 7 x 7 tokens that lie `ratio` apart. Each window is the mean of all such
    windows of the map. With a ratio of 1, 1 of 8 parts attends to the whole map and 7 to the window. Cost is linear in
    H * W, except for the first group, whose cost is quadratic in H * W, divided by ratio².

    The authors mirror the map once to fill the last window. This op mirrors it repeatedly, so that the map may be
    smaller than half a window.

    Args:
        dim: Number of channels.
        num_heads: Number of heads of the groups with windows; `dim / num_heads` must be at least 3, or 2 with a ratio
            of 1.
        place: The stage sets the default of `ratio`.
        ratio: Side of the map divided by the side of the coarse map; by default 8, 4, 2 and 1 by stage, as in the
            paper.
        qkv_bias: Give the query, key and value projections a bias; default True.
    """

    family = "mixed"
    renames = (
        (r"^kv_g\.", "coarse.kv."),
        (r"^sr\.", "coarse.reduce."),
        (r"^norm\.", "coarse.norm."),
        (r"^local_conv_g\.", "coarse.lepe."),
        (r"^kv_l\.depth_conv\.", "source.0."),
        (r"^kv_l\.point_conv\.", "source.1."),
        (r"^fcs\.(\d)\.", r"windows.\1.mix."),
        (r"^single_heads\.(\d)\.", r"windows.\1.kv."),
        (r"^local_convs\.(\d)\.", r"windows.\1.lepe."),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        ratio: int | None = None,
        qkv_bias: bool = True,
    ):
        super().__init__()
        ratio = RATIOS[min(place.stage, 3)] if ratio is None else ratio
        if ratio < 1:
            raise ValueError(f"ratio must be at least 1, not {ratio}")
        dilations = (1, ratio) if ratio > 1 else (1,)
        # Number of channels of each group with windows
        width = dim // num_heads * 7 // (8 * len(dilations)) * num_heads
        if not width:
            raise ValueError(f"a head must have at least {len(dilations) + 1} channels, not {dim // num_heads}")
        self.num_heads, self.local = num_heads, width * len(dilations)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.coarse = GlobalGroup(dim - self.local, ratio, qkv_bias)
        self.source = nn.Sequential(
            nn.Conv2d(self.local, self.local, 3, padding=1, groups=self.local), nn.Conv2d(self.local, self.local, 1)
        )
        self.windows = nn.ModuleList(LocalGroup(width, num_heads, dilation, qkv_bias) for dilation in dilations)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        widths = [x.shape[-1] - self.local, self.local]
        coarse_q, local_q = self.q(x).flatten(1, 2).split(widths, dim=-1)
        coarse_x, local_x = x.split(widths, dim=-1)
        local_x = self.source(local_x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        outs = [self.coarse(split_heads(coarse_q, 1), coarse_x)]
        # In the queries, each head has channels of all groups; in the map, each group has channels of all heads
        queries = split_heads(local_q, self.num_heads).chunk(len(self.windows), dim=-1)
        sources = local_x.chunk(len(self.windows), dim=-1)
        for group, q, source in zip(self.windows, queries, sources, strict=True):
            outs.append(group(q, source))
        return self.proj(torch.cat(outs, dim=-1).unflatten(1, x.shape[1:3]))
