"""Factorization self-attention of FaViT (Qin et al., TNNLS 2023, arXiv:2312.08614)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op

RATIOS = (8, 4, 2, 1)  # of the paper's stages
WINDOW = 7  # side of a window in sampled tokens


class GlobalGroup(nn.Module):
    """Attention of one head to a map made smaller: a convolution of patches, and a norm.

    A last patch that is not whole is left out; zeros pad a map that is smaller than one.
    """

    def __init__(self, dim: int, ratio: int, qkv_bias: bool):
        super().__init__()
        self.ratio = ratio
        self.reduce = nn.Conv2d(dim, dim, ratio, stride=ratio)
        self.norm = nn.LayerNorm(dim)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        """Queries (B, 1, N, D) of the tokens of a map (B, H, W, D) to (B, N, D)."""
        H, W = x.shape[1:3]
        x = F.pad(x.permute(0, 3, 1, 2), (0, max(self.ratio - W, 0), 0, max(self.ratio - H, 0)))
        k, v = self.kv(self.norm(self.reduce(x).permute(0, 2, 3, 1))).chunk(2, dim=-1)
        v = v + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        k, v = (split_heads(t.flatten(1, 2), 1) for t in (k, v))
        return merge_heads(F.scaled_dot_product_attention(q, k, v))


class LocalGroup(nn.Module):
    """Attention to one window, the mean of all windows of the map, whose tokens lie `dilation` apart."""

    def __init__(self, dim: int, num_heads: int, dilation: int, qkv_bias: bool):
        super().__init__()
        self.num_heads, self.dilation = num_heads, dilation
        head_dim = dim // num_heads
        self.mix = nn.Linear(head_dim, head_dim, bias=qkv_bias)
        self.kv = nn.Linear(head_dim, 2 * head_dim, bias=qkv_bias)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        """Queries (B, heads, N, D) of the tokens of a map (B, H, W, heads * D) to (B, N, heads * D)."""
        k, v = self.kv(self.mix(self.window(x))).chunk(2, dim=-1)
        lepe = self.lepe(v.transpose(2, 3).flatten(1, 2).unflatten(2, (WINDOW, WINDOW)))
        v = v + lepe.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)
        return merge_heads(F.scaled_dot_product_attention(q, k, v))

    def window(self, x: Tensor) -> Tensor:
        """The window that is attended to: (B, heads, 7 * 7, D).

        As the authors have it, the mean is of as many neighbouring values as there are windows in the order (windows,
        D), so it joins channels of a window where it should join windows of a channel.
        """
        rows, columns = (self.sampled(side, x.device) for side in x.shape[1:3])
        x = x.index_select(1, rows).index_select(2, columns)
        x = x.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW))  # (B, rows of windows, 7, columns, 7, heads * D)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)  # (B, 7 * 7, windows, heads * D)
        x = x.unflatten(3, (self.num_heads, -1)).permute(0, 3, 1, 2, 4)  # (B, heads, 7 * 7, windows, D)
        return x.flatten(3).unflatten(3, (x.shape[4], x.shape[3])).mean(-1)

    def sampled(self, side: int, device: torch.device) -> Tensor:
        """Along an axis, the places of the tokens of window after window: (windows * 7,).

        The map is mirrored at its end, as often as it takes to fill the last window.
        """
        span = self.dilation * (WINDOW - 1) + 1
        starts = torch.arange(-(-side // span), device=device) * span
        places = starts[:, None] + torch.arange(WINDOW, device=device) * self.dilation
        period = max(2 * (side - 1), 1)
        places = places.flatten() % period
        return torch.minimum(places, period - places)


@register_op("factorization")
class FactorizationAttention(nn.Module):
    """Channels are shared out to groups, and those of each token attend to less of the map in more detail.

    Of 16 parts of the channels 2 see the whole map, coarse; 7 see a window of 7 x 7 tokens and 7 one of tokens that
    lie `ratio` apart, each the mean of all such windows. With a ratio of 1, 1 of 8 parts sees the whole map and 7 the
    window. Cost is linear in H * W but for the first group, whose is quadratic, divided by ratio².

    The authors mirror the map to whole windows once; here again and again, so that it may be smaller than half a
    window.

    Args:
        dim, num_heads: channels and heads.
        ratio: of the sides of the map to those of the coarse map; by default 8, 4, 2 and 1 by stage.
        qkv_bias: give the query, key and value projections a bias.
    """

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
        width = dim // num_heads * 7 // (8 * len(dilations)) * num_heads  # of a group of windows
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
        parts = [x.shape[-1] - self.local, self.local]
        q, local_q = self.q(x).flatten(1, 2).split(parts, dim=-1)
        coarse, source = x.split(parts, dim=-1)
        source = self.source(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        groups, n = [self.coarse(split_heads(q, 1), coarse)], len(self.windows)
        queries = split_heads(local_q, self.num_heads).chunk(n, dim=-1)  # each head has channels of every group
        groups += [window(*pair) for window, *pair in zip(self.windows, queries, source.chunk(n, dim=-1), strict=True)]
        return self.proj(torch.cat(groups, dim=-1).unflatten(1, x.shape[1:3]))
