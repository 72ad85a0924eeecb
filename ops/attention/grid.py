"""Grid attention of MaxViT (Tu et al., ECCV 2022, arXiv:2204.01697)."""

from torch import Tensor

from ops.attention.window import WindowAttention
from ops.functional import window_attention
from ops.registry import FIRST, Place, register_op
from ops.windows import pad_to_multiple


@register_op("grid")
class GridAttention(WindowAttention):
    """Self-attention among tokens spread evenly over the map, with a learned bias for each relative position.

    Each group takes every n-th token along each side, n the least with which a group is not larger than the grid; for
    sides that are multiples of `grid` that is MaxViT's. Zeros pad the map on the right and at the bottom to multiples
    of n, and are attended to. Cost is linear in H * W.

    Args:
        dim, num_heads: channels and heads.
        grid: most tokens of a group along each side.
    """

    renames = (*WindowAttention.renames, (r"^rel_pos\.", ""))

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, grid: int = 7):
        if grid < 1:
            raise ValueError(f"grid must be at least 1, not {grid}")
        super().__init__(dim, num_heads, place=place, window=grid, shift=0)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        steps = (-(-H // self.window_size[0]), -(-W // self.window_size[1]))
        x = pad_to_multiple(x, steps)
        grid = (x.shape[1] // steps[0], x.shape[2] // steps[1])
        qkv = self.qkv(x).unflatten(-1, (3, -1))
        out = window_attention(qkv, self.bias(grid), self.num_heads, grid, pattern="grid")
        return self.proj(out[:, :H, :W])
