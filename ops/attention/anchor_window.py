"""Windows with low-resolution anchors, of Scale-DiT.

Paper: Scale-DiT: Ultra-High-Resolution Image Generation with Hierarchical Local Attention (Zhang and Tai,
arXiv:2510.16325). Written after the paper and what the authors' repository, PeterYYZhang/Scale-DiT (no licence file),
computes. The authors' anchors are a second, smaller image. Here they are means of the map, the anchors of a large map
are tiles instead of a run in raster order, and the position bias is learned: these three are ours.
"""

import math
from typing import Any

import torch
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from ops.lora import low_rank
from ops.registry import FIRST, Place, register_op
from ops.tiles import (
    QueryTiles,
    attend_in_tiles,
    gather_tiles,
    relative_bias,
    sliding_tiles,
    window_tiles,
)
from ops.windows import window_means
from retinue.utils.arithmetic import ceil_div

# Largest number of anchors that all tokens attend to by default
MAX_ANCHORS = 256


@register_op("anchor_window")
class AnchorWindowAttention(nn.Module):
    """Tokens attend to a window and to anchors, which are means over cells of the map, in one softmax.

    The window slides with the token and is cut off where the map ends, or the map is cut into blocks after a cyclic
    shift, where tokens from opposite sides of the map may share a block. Scores in a window have a learned bias for
    each relative position; anchors have none. Cost is linear in H * W if the anchors are local, else quadratic,
    divided by pool².

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The block sets the default of `shift`.
        window: Size of a window in tokens: one number, or one along H and one along W; default 16. A sliding window
            reaches window // 2 tokens to each side.
        form: "sliding" (default) or "block".
        shift: Number of tokens by which the map is rolled down and to the right before it is cut into blocks, from 0 to
            the smaller side of the window - 1. By default half of that side in every second block of a stage, and 0 in
            the others. Sliding windows have no shift.
        pool: Side of an anchor's cell in tokens; default 4.
        anchors: Anchors that a token attends to: "all"; or "local", where the anchors are cut into tiles of the size of
            a window, and the token attends to the tile of its window and the 8 tiles around it. By default all if there
            are at most 256, else local.
        rank: Rank of a change of the key and value projections for anchors; by default 0 for no change. The paper has
            16.
        train_keys: Number of keys that scores are scaled for: they are multiplied by √(ln(keys) / ln(train_keys)). The
            authors have 4608. By default there is no such factor.
        bias: Learn a bias for each relative position in a window; default True.
    """

    family = "mixed"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int | tuple[int, int] = 16,
        form: str = "sliding",
        shift: int | None = None,
        pool: int = 4,
        anchors: str | None = None,
        rank: int = 0,
        train_keys: int | None = None,
        bias: bool = True,
    ):
        super().__init__()
        # Any, because the annotation of to_2tuple does not say that it returns a pair
        pair: Any = to_2tuple
        self.window = pair(window)
        if min(*self.window, pool) < 1:
            raise ValueError(f"window and pool must be at least 1, not {window} and {pool}")
        if form not in ("sliding", "block"):
            raise ValueError(f"form must be 'sliding' or 'block', not {form!r}")
        if anchors not in ("all", "local", None):
            raise ValueError(f"anchors must be 'all' or 'local', not {anchors!r}")
        if train_keys is not None and train_keys < 2:
            raise ValueError(f"train_keys must be at least 2, not {train_keys}")
        side: int = min(self.window)
        shift = side // 2 * (place.block % 2) if shift is None else shift
        if not 0 <= shift < side:
            raise ValueError(f"shift must be from 0 to {side - 1}, not {shift}")
        self.num_heads, self.sliding, self.shift, self.pool = num_heads, form == "sliding", shift, pool
        self.anchors, self.train_keys = anchors, train_keys
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.change = nn.ModuleList(low_rank(dim, dim, rank) for _ in range(2 if rank else 0))
        self.relative_position_bias_table = None
        if bias:
            sides = (2 * (w // 2) + 1 if self.sliding else 2 * w - 1 for w in self.window)
            self.relative_position_bias_table = nn.Parameter(torch.empty(num_heads, *sides))
            trunc_normal_(self.relative_position_bias_table, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return set() if self.relative_position_bias_table is None else {"relative_position_bias_table"}

    def forward(self, x: Tensor) -> Tensor:
        anchors = self.project_anchors(x)
        rows, columns = (self.tiles(x, axis) for axis in (0, 1))
        shared, mask = anchors.flatten(1, 2).unsqueeze(1), None  # (B, 1, M, 2C)
        if self.anchors == "local" or (self.anchors is None and shared.shape[2] > MAX_ANCHORS):
            shared, mask = self.local_anchors(anchors, rows, columns)
        scale = (x.shape[3] // self.num_heads) ** -0.5
        if self.train_keys is not None:
            keys = min(self.window[0], x.shape[1]) * min(self.window[1], x.shape[2]) + shared.shape[2]
            scale *= math.sqrt(math.log(max(keys, 2)) / math.log(self.train_keys))
        table = self.relative_position_bias_table
        bias = None if table is None else relative_bias(table, rows, columns)
        out = attend_in_tiles(
            self.qkv(x), self.num_heads, rows, columns, bias=bias, scale=scale, shared=shared, shared_mask=mask
        )
        return self.proj(out)

    def project_anchors(self, x: Tensor) -> Tensor:
        """Return the keys and values of the anchors of a map (B, H, W, C): (B, ⌈H / pool⌉, ⌈W / pool⌉, 2C)."""
        means = window_means(x, (self.pool, self.pool))
        out = self.qkv(means)[..., x.shape[3] :]
        if self.change:
            out = out + torch.cat([change(means) for change in self.change], dim=-1)
        return out.unflatten(1, (ceil_div(x.shape[1], self.pool), -1))

    def tiles(self, x: Tensor, axis: int) -> QueryTiles:
        """Return the tiles of the map's side `axis`, whose length divides the window's."""
        n, window = x.shape[1 + axis], self.window[axis]
        if self.sliding:
            # Tiles of about 8 x 8 queries are fastest on the CPU; operations are counted for each query alone
            tile = window // 2 if window > 8 and window % 2 == 0 else window
            tile = 1 if x.is_meta else tile
            return sliding_tiles(n, window // 2, tile, x.device)
        return window_tiles(n, min(window, n), -self.shift % n, True, x.device)

    def local_anchors(self, anchors: Tensor, rows: QueryTiles, columns: QueryTiles) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the anchors near each tile, (B, P, M, 2C), and a mask (P, M) of them."""
        boxes = []
        for tiles, window, n in zip((rows, columns), self.window, anchors.shape[1:3], strict=True):
            start = torch.arange(len(tiles.queries), device=anchors.device).unsqueeze(1) * tiles.queries.shape[1]
            first = (start // (self.pool * window) - 1) * window
            box = min(3 * window, n)
            key = first.clamp(0, n - box) + torch.arange(box, device=anchors.device)
            boxes.append((key, (key >= first) & (key < first + 3 * window)))
        (row, near_row), (column, near_column) = boxes
        near = near_row[:, None, :, None] & near_column[None, :, None, :]
        return gather_tiles(anchors, row, column), near.flatten(2).flatten(0, 1)
