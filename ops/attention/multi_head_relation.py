"""Multi-head relation aggregation of UniFormer (Li et al., TPAMI 2023, arXiv:2201.09450).

Written after the paper and the authors' repository, Sense-X/UniFormer (Apache-2.0).
"""

from torch import Tensor, nn

from ops.functional import map_attention
from ops.registry import FIRST, Place, register_op
from ops.windows import from_windows, pad_to_multiple, to_windows


@register_op("multi_head_relation")
class MultiHeadRelation(nn.Module):
    """Values are aggregated by an affinity of tokens, which has two forms.

    "local": learned for each channel and relative position among 5 x 5 tokens, whatever they hold, which is a
    depthwise convolution between two linear maps. Cost is linear in H * W. "global": self-attention over the whole
    map, of quadratic cost, or inside windows, of linear cost. For windows, zeros pad the map on the right and at the
    bottom, and are attended to, also where the map is smaller than a window.

    Args:
        dim, num_heads: channels and heads; the local form has a head a channel.
        form: "local" or "global"; by default local in the first two stages, as in the paper.
        window: side of the global form's windows in tokens; 0 for the whole map.
    """

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, form: str | None = None, window: int = 0):
        super().__init__()
        form = ("local" if place.stage < 2 else "global") if form is None else form
        if form not in ("local", "global") or window < 0:
            raise ValueError(f"form must be 'local' or 'global' and window at least 0, not {form!r} and {window}")
        self.num_heads, self.window, self.form = num_heads, window, form
        if form == "local":
            self.value = nn.Linear(dim, dim)
            self.affinity = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "local":
            return self.proj(self.affinity(self.value(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        if not self.window:
            return self.proj(self.attend(x))
        H, W = x.shape[1:3]
        x = pad_to_multiple(x, (self.window, self.window))
        size, grid = x.shape[1:3], (x.shape[1] // self.window, x.shape[2] // self.window)
        windows = to_windows(x, grid)  # (B, windows, tokens, C)
        out = self.attend(windows.flatten(0, 1).unsqueeze(1)).view_as(windows)  # as maps of one row
        return self.proj(from_windows(out, grid, size)[:, :H, :W])

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return map_attention(q, k, v, self.num_heads)
