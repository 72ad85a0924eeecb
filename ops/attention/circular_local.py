"""Circular local attention of CLEAR, with an optional pooled branch.

Paper: CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up (Liu et al., arXiv:2412.16112). Written
after the paper and the authors' repository, Huage001/CLEAR (Apache-2.0). The cells of pooling that reach beyond the map
are ours.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ops.extra import extra_attention
from ops.registry import FIRST, Place, register_op
from ops.tiles import attend_in_tiles, pairs, sliding_tiles
from ops.windows import weighted_sums


@register_op("circular_local")
class CircularLocalAttention(nn.Module):
    """Tokens attend to the tokens whose distance is less than `radius`, and optionally to a pooled map.

    The edge of the map cuts off the circle. With `pool`, keys and values are also summed over cells of pool x pool
    tokens with learned weights, which all heads and channels share; all tokens of the map attend to all cells, in the
    same softmax. A cell that reaches beyond the map is scaled to as many tokens. Extra tokens attend to all tokens
    except the cells, and all tokens attend to them. Cost is linear in H * W; with `pool` it is quadratic, divided by
    pool².

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        radius: Distance in tokens that all keys of a query are closer than; default 8.
        pool: Side of a cell in tokens, 4 in the paper; by default there are no cells.
    """

    family = "local"
    takes_extra = True

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, radius: int = 8, pool: int | None = None):
        super().__init__()
        if radius < 1 or (pool is not None and pool < 1):
            raise ValueError(f"radius and pool must be at least 1, not {radius} and {pool}")
        self.num_heads, self.radius = num_heads, radius
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.spatial_weight = nn.Parameter(torch.full((pool, pool), pool**-2.0)) if pool else None

    def no_weight_decay(self) -> set[str]:
        return set() if self.spatial_weight is None else {"spatial_weight"}

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        (H, W), C = x.shape[1:3], x.shape[3]
        qkv = self.qkv(x)
        extra_qkv = self.qkv(x.new_empty(x.shape[0], 0, C) if extra is None else extra)  # (B, E, 3C)
        shared = extra_qkv[..., C:]
        if self.spatial_weight is not None:
            cells = weighted_sums(qkv[..., C:], self.spatial_weight.unsqueeze(-1))
            shared = torch.cat([shared, cells.flatten(1, 2)], dim=1)
        tile = 1 if x.is_meta else self.radius
        rows, columns = (sliding_tiles(n, self.radius - 1, tile, x.device) for n in (H, W))
        dy, dx = pairs(rows.offsets, columns.offsets)
        near_y, near_x = pairs(rows.attended, columns.attended)
        attended = near_y & near_x & (dy**2 + dx**2 < self.radius**2)
        out = attend_in_tiles(qkv, self.num_heads, rows, columns, attended, shared=shared.unsqueeze(1))
        if extra is None:
            return self.proj(out)
        return self.proj(out), self.proj(extra_attention(extra_qkv, qkv, self.num_heads))

    def resize_table(self, name: str, table: Tensor) -> Tensor:
        """Remove the dimensions of size 1 that the authors' weights have, for `load_weights`."""
        return table.squeeze()
