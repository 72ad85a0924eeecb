"""Global and local window attention of GCViT (Hatamizadeh et al., ICML 2023, arXiv:2206.09959).

Written after the paper and timm (Apache-2.0); the code of the authors, NVlabs/GCVit, has a licence that forbids it.
"""

import torch
import torch.nn.functional as F
from timm.models.gcvit import FeatureBlock
from torch import Tensor, nn

from ops.attention.window import WindowAttention
from ops.functional import biased_attention
from ops.registry import FIRST, Place, register_op
from ops.windows import from_windows, pad_to_multiple, to_windows

WINDOWS = (7, 7, 14, 7)  # of the paper's stages


class GlobalQuery(nn.Module):
    """What all windows of a stage ask for, made from its map (B, H, W, C): (B, h, w, C) of a window's size.

    As many convolutions and poolings as bring the map of an image of 224 pixels to that size, or as are given; what
    they make of another map is interpolated, as in the authors' detection code.
    """

    def __init__(
        self,
        place: Place,
        dim: int,
        num_heads: int,
        window: int | None = None,
        poolings: int | None = None,
        shrink: bool = True,
    ):
        super().__init__()
        self.window, self.shrink = _window(place, window), shrink
        halvings = (224 // (place.stride * self.window)).bit_length() - 1
        self.features = FeatureBlock(dim, max(halvings, 0) if poolings is None else poolings)

    def forward(self, x: Tensor) -> Tensor:
        size = torch.Size(min(self.window, side) if self.shrink else self.window for side in x.shape[1:3])
        out = self.features(x.permute(0, 3, 1, 2))
        if out.shape[2:] != size:
            out = F.interpolate(out, size, mode="bicubic")
        return out.permute(0, 2, 3, 1)


@register_op("global_query")
class GlobalQueryAttention(WindowAttention):
    """Attention inside windows: "local" by each window's own queries, "global" by queries that all windows share.
    Cost is linear in H * W.

    The stage makes the global queries once a forward pass for all its blocks; where none are handed over, they are the
    map itself, averaged to a window's size. Scores have a learned bias for each relative position. Zeros pad the map on
    the right and at the bottom until windows fit, and are attended to. Along a side that is not longer than the window,
    the window is that side, if it may shrink.

    Args:
        dim, num_heads: channels and heads.
        window: side of a window in tokens; by default 14 in the third stage and 7 in the others, as in the paper.
        form: "local" or "global"; by default global in every second block of a stage, as in the paper.
        poolings: of the maps that the global queries are made from; by default down to a window at 224 pixels.
        shrink: let windows shrink on small maps; False pads such maps too, as the authors' detection code does.
        qkv_bias: give the query, key and value projections a bias.
    """

    renames = (*WindowAttention.renames, (r"^rel_pos\.", ""))

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int | None = None,
        form: str | None = None,
        poolings: int | None = None,
        shrink: bool = True,
        qkv_bias: bool = True,
    ):
        form = ("local", "global")[place.block % 2] if form is None else form
        if form not in ("local", "global"):
            raise ValueError(f"form must be 'local' or 'global', not {form!r}")
        super().__init__(dim, num_heads, place=place, window=_window(place, window), shift=0, qkv_bias=qkv_bias)
        self.shrink = shrink
        self.make_context = GlobalQuery if form == "global" else None  # a stage of local blocks alone makes no query
        if form == "global":
            self.qkv = nn.Linear(dim, 2 * dim, bias=qkv_bias)  # of keys and values, under the authors' name

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        H, W = x.shape[1:3]
        if not self.shrink:
            x = F.pad(x, (0, 0, 0, max(self.window_size[1] - W, 0), 0, max(self.window_size[0] - H, 0)))
        if self.make_context is None:
            return super().forward(x)[:, :H, :W]
        window = (min(self.window_size[0], x.shape[1]), min(self.window_size[1], x.shape[2]))
        if context is None:
            context = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), window).permute(0, 2, 3, 1)
        x = pad_to_multiple(x, window)
        size = x.shape[1:3]
        grid = (size[0] // window[0], size[1] // window[1])

        kv = to_windows(self.qkv(x), grid)
        q = context.flatten(1, 2).unsqueeze(1).expand(-1, kv.shape[1], -1, -1)  # (B, windows, tokens, C)
        out = biased_attention(torch.cat((q, kv), dim=-1), self.bias(window), self.num_heads)
        return self.proj(from_windows(out, grid, size)[:, :H, :W])


def _window(place: Place, window: int | None) -> int:
    return WINDOWS[min(place.stage, 3)] if window is None else window
