"""Multi-head relation aggregator of UniFormer (Li et al., TPAMI 2023, arXiv:2201.09450).

Written after the paper and the authors' repository, Sense-X/UniFormer (Apache-2.0).
"""

from torch import Tensor, nn

from ops.functional import map_attention
from ops.registry import FIRST, Place, register_op
from ops.windows import from_windows, pad_to_multiple, to_windows


@register_op("multi_head_relation")
class MultiHeadRelation(nn.Module):
    """Values are aggregated by an affinity between tokens: learned for each offset (local), or self-attention (global).

    The local form learns a weight for each channel and each offset in 5 x 5 tokens; it is a depthwise convolution
    between two linear layers. Its cost is linear in H * W. The global form is self-attention over the whole map, with a
    cost quadratic in H * W, or inside windows, with a linear cost. For windows, the map is zero-padded on the right and
    at the bottom to a multiple of the window, even if the map is smaller than a window; padded tokens are attended to.

    Args:
        dim: Number of channels.
        num_heads: Number of heads of the global form; the local form has one for each channel.
        place: The stage sets the default of `form`.
        form: "local" or "global"; by default local in the first two stages, as in the paper.
        window: Side of the global form's windows in tokens, or 0 (default) for the whole map.
    """

    family = "mixed"

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
        # Attention does not depend on the order of the tokens, so each window may be a map of one row
        out = self.attend(windows.flatten(0, 1).unsqueeze(1)).view_as(windows)
        return self.proj(from_windows(out, grid, size)[:, :H, :W])

    def attend(self, x: Tensor) -> Tensor:
        """Compute self-attention over all tokens of a map (B, H, W, C), up to the output projection."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return map_attention(q, k, v, self.num_heads)
