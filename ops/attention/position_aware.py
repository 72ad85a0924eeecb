"""Position-aware attention scaling of RVT* (Mao et al., CVPR 2022, arXiv:2105.07926, section 4.1).

Written after the paper and guoyongcs/TAPADL (MIT), which has the op.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from ops.attention.full import uniformity
from ops.functional import merge_heads, split_heads
from ops.losses import Losses
from ops.registry import FIRST, Place, register_op
from retinue.utils.arithmetic import ceil_div

# Largest side of the map that a table is learned for by default: the table has the fourth power of it as entries.
LARGEST_SIDE = 14


@register_op("position_aware")
class PositionAwareAttention(nn.Module):
    """All tokens attend to all tokens of the map, by scores that a learned table scales for each pair of places.

    The scale is the sigmoid of the table's entry. The table is interpolated for maps of another size. Cost is quadratic
    in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stride sets the default of `size`.
        size: Size (H, W) of the map for which the table is learned, or one number for both; by default the size at an
            image of 224 pixels, with sides of 14 at most.
        diversity: Threshold of the loss `diversity`, as in the op "full"; default 0: no such loss.

    Raises:
        ValueError: `size` or `diversity` is out of its range.
    """

    family = "full"
    loss_weights = (("diversity", 1.0),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        size: int | tuple[int, int] | None = None,
        diversity: float = 0.0,
    ):
        super().__init__()
        H, W = map(int, to_2tuple(min(ceil_div(224, place.stride), LARGEST_SIDE) if size is None else size))
        if min(H, W) < 1 or diversity < 0:
            raise ValueError(f"size must be at least 1 and diversity at least 0, not {size} and {diversity}")
        self.num_heads, self.size, self.diversity = num_heads, (H, W), diversity
        if not diversity:
            self.loss_weights = ()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        # The authors truncate at one standard deviation.
        self.att_mask = nn.Parameter(trunc_normal_(torch.empty(num_heads, H * W, H * W), std=0.02, a=-0.02, b=0.02))

    def resize_table(self, name: str, value: Tensor) -> Tensor:
        """Interpolate a checkpoint's table, learned for a square map, to this op's size, for `load_weights`."""
        side = round(value.shape[-1] ** 0.5)
        return resize_pairs(value, (side, side), self.size) if name == "att_mask" else value

    def forward(self, x: Tensor, losses: Losses | None = None) -> Any:
        size = (x.shape[1], x.shape[2])
        q, k, v = split_heads(self.qkv(x.flatten(1, 2)), 3 * self.num_heads).chunk(3, dim=1)
        scale = resize_pairs(self.att_mask, self.size, size).sigmoid() * q.shape[-1] ** -0.5
        scores = q @ k.transpose(-2, -1) * scale.to(q.dtype)
        if losses is not None:
            losses.add("diversity", uniformity(scores, self.diversity))
        return self.proj(merge_heads(scores.softmax(-1) @ v)).view(x.shape)


def resize_pairs(table: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Interpolate a table of pairs of places (heads, h * w, h * w) of a grid (h, w) to (heads, H * W, H * W)."""
    if grid == size:
        return table
    keys = F.interpolate(table.unflatten(2, grid), size, mode="bilinear").flatten(2)  # (heads, h * w, H * W)
    return F.interpolate(keys.transpose(1, 2).unflatten(2, grid), size, mode="bilinear").flatten(2).transpose(1, 2)
