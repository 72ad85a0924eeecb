"""Grid attention of MaxViT (Tu et al., ECCV 2022, arXiv:2204.01697).

The authors' repository is google-research/maxvit; the op computes the same as timm's module (Apache-2.0) where the
sides of the map are multiples of `grid`.
"""

from torch import Tensor

from ops.attention.window import WindowAttention
from ops.functional import window_attention
from ops.registry import FIRST, Place, register_op
from ops.windows import pad_to_multiple
from retinue.utils.arithmetic import ceil_div


@register_op("grid")
class GridAttention(WindowAttention):
    """Tokens attend to tokens spread evenly over the map, with a learned bias for each relative position.

    A group holds every n-th token along each side, where n is the smallest number for which a group has at most `grid`
    tokens along that side. If the sides of the map are multiples of `grid`, the groups are MaxViT's. The map is
    zero-padded on the right and at the bottom to a multiple of n; padded tokens are attended to. Cost is linear in
    H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        grid: Maximum number of tokens of a group along each side; default 7.
    """

    family = "sparse"
    renames = (*WindowAttention.renames, (r"^rel_pos\.", ""))

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, grid: int = 7):
        if grid < 1:
            raise ValueError(f"grid must be at least 1, not {grid}")
        super().__init__(dim, num_heads, place=place, window=grid, shift=0)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        steps = (ceil_div(H, self.window_size[0]), ceil_div(W, self.window_size[1]))
        x = pad_to_multiple(x, steps)
        grid = (x.shape[1] // steps[0], x.shape[2] // steps[1])
        qkv = self.qkv(x).unflatten(-1, (3, -1))
        bias, scale = self.softmax.window_options(self.bias(grid), grid)
        out = window_attention(qkv, bias, self.num_heads, grid, scale=scale, pattern="grid")
        return self.proj(out[:, :H, :W])
