"""Global and local window attention of GCViT (Hatamizadeh et al., ICML 2023, arXiv:2206.09959).

Written after the paper and timm (Apache-2.0). The licence of the authors' repository, NVlabs/GCVit, forbids commercial
use, so none of its code is here.
"""

import torch
import torch.nn.functional as F
from timm.models.gcvit import FeatureBlock
from torch import Tensor, nn

from ops.attention.window import WindowAttention
from ops.functional import biased_attention
from ops.registry import FIRST, Place, register_op
from ops.windows import from_windows, pad_to_multiple, to_windows

# Side of a window in each stage of the paper's nets
WINDOWS = (7, 7, 14, 7)


class GlobalQuery(nn.Module):
    """Compute the queries that all windows of a stage share, (B, h, w, C), from the stage's map (B, H, W, C).

    Convolutions, each followed by a pooling, reduce the map to the window's size (h, w). For a map that they reduce to
    another size, the result is interpolated bicubically, as in the authors' detection code.

    Args:
        place: The stage sets the default of `window`, the stride that of `poolings`.
        dim: Number of channels.
        num_heads: Without effect; an argument of every op's `make_context`.
        window: Side of a window in tokens; by default 7, 7, 14 and 7 by stage.
        poolings: Number of poolings; by default as many as reduce the map of an image of 224 pixels to a window.
        shrink: Let the window shrink to a side of the map that is shorter.
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
        self.window, self.shrink = default_window(place, window), shrink
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
    """Windows attend to their own tokens: by their own queries, or by global queries that all windows share.

    Scores have a learned bias for each relative position. The stage computes the global queries once in each forward
    pass for all of its blocks; without a stage, they are the map itself, averaged to a window's size. The map is
    zero-padded on the right and at the bottom to a multiple of the window; padded tokens are attended to. If a side of
    the map is shorter than the window, the window shrinks to that side, unless `shrink` is False. Cost is linear in
    H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stage sets the default of `window`, the block that of `form`, the stride that of `poolings`.
        window: Side of a window in tokens; by default 14 in the third stage and 7 in the others, as in the paper.
        form: "local" (own queries) or "global"; by default global in every second block of a stage, as in the paper.
        poolings: Number of poolings between the stage's map and the global queries; by default as many as reduce the
            map of an image of 224 pixels to a window.
        shrink: Let windows shrink on small maps; default True. False pads such maps too, as the authors' detection code
            does.
        qkv_bias: Give the query, key and value projections a bias; default True.
    """

    family = "local"
    renames = (*WindowAttention.renames, (r"^rel_pos\.", ""))

    # The temperature would have to follow the global queries too
    softmax_options = False
    make_context: type[GlobalQuery] | None = GlobalQuery

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
        super().__init__(dim, num_heads, place=place, window=default_window(place, window), shift=0, qkv_bias=qkv_bias)
        self.shrink = shrink
        if form == "local":
            # A stage without global blocks then computes no global queries.
            self.make_context = None
        else:
            # Keys and values only, but under the authors' name
            self.qkv, self.widths = nn.Linear(dim, 2 * dim, bias=qkv_bias), (dim, dim)

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


def default_window(place: Place, window: int | None) -> int:
    """Return `window`, or the paper's for the stage if it is None."""
    return WINDOWS[min(place.stage, 3)] if window is None else window
