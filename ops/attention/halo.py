"""Blocked local attention of HaloNet (Vaswani et al., CVPR 2021, arXiv:2103.12731).

The op computes the same as timm's module (Apache-2.0).
"""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ops.functional import biased_sdpa, merge_heads, split_heads
from ops.registry import FIRST, Place, register_op
from ops.weighting import Values
from ops.windows import from_windows, pad_to_multiple, to_windows


@register_op("halo")
class HaloAttention(nn.Module):
    """The tokens of each block attend to the block and to a halo of tokens around it.

    Scores add, for each axis, the product of the query with a learned vector of the relative position. Keys and values
    are zero-padded around the map; padded tokens are attended to. If a side of the map is shorter than a block, the
    block shrinks to that side. HaloNet has no output projection, because the convolution that follows serves as one.
    Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        block: Side of a block in tokens; default 8.
        halo: Number of tokens on each side of a block that its queries attend to as well; default 3.
    """

    family = "local"
    renames = ((r"^pos_embed\.", ""),)

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, block: int = 8, halo: int = 3):
        super().__init__()
        if block < 1 or halo < 0:
            raise ValueError(f"block must be at least 1 and halo at least 0, not {block} and {halo}")
        self.num_heads, self.block, self.halo = num_heads, block, halo
        head_dim, window = dim // num_heads, block + 2 * halo
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.values = Values()
        self.proj = nn.Linear(dim, dim)
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim))
        for table in (self.height_rel, self.width_rel):
            trunc_normal_(table, std=head_dim**-0.5)

    def no_weight_decay(self) -> set[str]:
        return {"height_rel", "width_rel"}

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        block = (min(self.block, H), min(self.block, W))
        x = pad_to_multiple(x, block)
        grid = (x.shape[1] // block[0], x.shape[2] // block[1])

        q = split_heads(to_windows(self.q(x), grid), self.num_heads)  # (B, blocks, heads, block², D)
        k, v = self.kv(x).unflatten(-1, (self.num_heads, 2, -1)).unbind(-2)  # (B, H, W, heads, D)
        v = self.values(v.flatten(3)).view_as(v)
        k, v = (self.surroundings(t, block) for t in (k, v))
        out = merge_heads(biased_sdpa(q, k, v, self.position_scores(q, block)))
        return self.proj(from_windows(out, grid, x.shape[1:3])[:, :H, :W])

    def surroundings(self, x: Tensor, block: tuple[int, int]) -> Tensor:
        """Return the windows around all blocks of a map (B, H, W, heads, D): (B, blocks, heads, window², D)."""
        x = F.pad(x, (0, 0, 0, 0, *[self.halo] * 4))
        for axis, side in enumerate(block, start=1):
            x = x.unfold(axis, side + 2 * self.halo, side)
        return x.flatten(1, 2).flatten(-2).transpose(-2, -1)

    def position_scores(self, q: Tensor, block: tuple[int, int]) -> Tensor:
        """Return the positional scores (B, blocks, heads, block², window²) of queries (B, blocks, heads, block², D).

        The window is the block with its halo.
        """
        q = q.unflatten(3, block)
        rows, columns = (
            table[self.relative_position(side)]
            for table, side in zip((self.height_rel, self.width_rel), block, strict=True)
        )  # (block, window, D)
        rows = torch.einsum("bphijd,ikd->bphijk", q, rows)
        columns = torch.einsum("bphijd,jkd->bphijk", q, columns)
        return (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(5).flatten(3, 4)

    def relative_position(self, side: int) -> Tensor:
        """Return the row of a table for each query of a block and each key of its window along an axis.

        Args:
            side: Side of the block in tokens.

        Returns:
            Tensor (block, window) of integers.
        """
        queries, keys = (torch.arange(n, device=self.height_rel.device) for n in (side, side + 2 * self.halo))
        return keys - queries[:, None] + self.block + 2 * self.halo - 1
