"""Block-sparse attention that is dense on small maps, InfLLM-V2.

Paper: InfLLM-V2: Dense-Sparse Switchable Attention for Seamless Short-to-Long Adaptation (Zhao et al., 2025,
arXiv:2509.24663). Written after the description of the authors' repository, OpenBMB/infllmv2_cuda_impl. The paper is
about causal attention to runs of text; here blocks are tiles of the map, nothing is causal, and extra tokens take the
place of the first block, which everything attends to.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.blocks import Blocks, block_attention, fit_block, top_blocks
from ops.extra import extra_attention, keys_and_values
from ops.functional import split_heads
from ops.precision import at_least_float32, without_autocast
from ops.rectification import pooled_attention, rectify
from ops.registry import FIRST, Place, register_op
from retinue.utils.arithmetic import ceil_div

UNITS = ("token", "tile")


@register_op("block_sparse_switch")
class BlockSparseSwitchAttention(nn.Module):
    """Tokens attend to the tiles near them and to the tiles that hold the best-matching patches; to all on small maps.

    Patches overlap: they have twice the side of their stride. A patch's score is the softmax, over all patches, of the
    products of a query with the mean keys of the patches, summed over the query heads that share a key head. A tile's
    score is that of the best patch that touches it. The near tiles count among the `topk`. On maps of fewer than
    `dense_below` tokens this is full attention, with the same weights. Extra tokens are attended to by all tokens and
    attend to all tokens. Padded tokens are neither attended to nor counted. Cost is H * W times the number of patches
    and times the tokens of `topk` tiles.

    Args:
        dim: Number of channels.
        num_heads: Number of query heads.
        tile: Side of a tile in tokens; default 8.
        stride: Distance between patches in tokens; their side is twice that. Default 4.
        topk: Number of tiles that a query attends to, the near ones included; default 12.
        local: Tiles at a distance of less than `local` tiles along both sides are near; default 2, for 3 x 3 tiles.
        per: "token" (default): each token chooses its tiles. "tile": the tokens of a tile choose together, by their
            mean query.
        kv_heads: Number of key and value heads, a divisor of `num_heads`; default `num_heads`.
        dense_below: Number of tokens of the map from which on attention is sparse; default 1024.
        rectify: Correct the output by the pooled attention to the tiles that were not chosen, as the op
            `rectified_sparse` does; default False.
    """

    family = "sparse"
    takes_extra = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        tile: int = 8,
        stride: int = 4,
        topk: int = 12,
        local: int = 2,
        per: str = "token",
        kv_heads: int | None = None,
        dense_below: int = 1024,
        rectify: bool = False,
    ):
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        if min(tile, stride, topk) < 1 or local < 0:
            given = f"{tile}, {stride}, {topk} and {local}"
            raise ValueError(f"tile, stride and topk must be at least 1 and local at least 0, not {given}")
        if per not in UNITS:
            raise ValueError(f"per must be one of {', '.join(UNITS)}, not {per!r}")
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"kv_heads must divide {num_heads}, the number of heads, not {kv_heads}")
        self.num_heads, self.kv_heads, self.tile, self.stride, self.topk = num_heads, kv_heads, tile, stride, topk
        self.local, self.per, self.dense_below, self.rectify = local, per, dense_below, rectify
        self.widths = (dim, dim // num_heads * kv_heads, dim // num_heads * kv_heads)
        self.qkv = nn.Linear(dim, sum(self.widths))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        qkv = self.with_all_heads(self.qkv(x))
        extra_qkv = None if extra is None else self.with_all_heads(self.qkv(extra))
        size = (x.shape[1], x.shape[2])
        dense = size[0] * size[1] < self.dense_below
        cut = Blocks(size, size) if dense else fit_block((self.tile, self.tile), size)
        q, k, v = (cut.split(t, self.num_heads) for t in qkv.chunk(3, dim=-1))
        sinks = None if extra_qkv is None else keys_and_values(extra_qkv, self.num_heads)
        if dense:
            chosen = torch.ones(1, 1, dtype=torch.bool, device="cpu")
            out = block_attention(q, k, v, chosen, count=1, extra=sinks)
        else:
            out = self.sparse(q, k, v, self.choose(qkv.detach(), cut), cut, sinks)
        out = self.proj(cut.join(out))
        if extra_qkv is None:
            return out
        return out, self.proj(extra_attention(extra_qkv, qkv, self.num_heads))

    def with_all_heads(self, qkv: Tensor) -> Tensor:
        """Repeat the keys and values of (..., channels) for the query heads that share them: (..., 3C)."""
        repeats = self.num_heads // self.kv_heads
        if repeats == 1:
            return qkv
        q, k, v = qkv.split(self.widths, dim=-1)
        k, v = (t.unflatten(-1, (self.kv_heads, -1)).repeat_interleave(repeats, -2).flatten(-2) for t in (k, v))
        return torch.cat([q, k, v], dim=-1)

    def sparse(
        self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, cut: Blocks, sinks: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Compute attention to chosen tiles, (B, heads, M, L, D), for the mask (B, heads, M * L or M, M)."""
        real = cut.real(q.device) if cut.padded else None
        groups = q.flatten(2, 3).unsqueeze(3) if self.per == "token" else q
        out = block_attention(groups, k, v, chosen, real, min(self.topk, cut.number), extra=sinks)
        if self.rectify:
            pooled = pooled_attention(q, k, cut, None if sinks is None else sinks[0])
            out = rectify(out, pooled, chosen, cut.means(v))
        return out.view(q.shape)

    def choose(self, qkv: Tensor, cut: Blocks) -> Tensor:
        """Return the mask (B, heads, G, M) of the tiles that each token or tile attends to.

        Args:
            qkv: Queries, keys and values (B, H, W, 3C) of all heads.
            cut: The M tiles.
        """
        q, k, _ = qkv.chunk(3, dim=-1)
        with without_autocast(q):
            q, k = at_least_float32(q, k)
            queries = cut.split(q, self.num_heads)  # (B, heads, M, L, D)
            queries = queries.flatten(2, 3) if self.per == "token" else cut.means(queries)
            patch = (min(2 * self.stride, cut.size[0]), min(2 * self.stride, cut.size[1]))
            # At the end of the map, a patch is the mean of its tokens on the map
            patches = F.avg_pool2d(k.permute(0, 3, 1, 2), patch, self.stride, ceil_mode=True)
            grid = (patches.shape[2], patches.shape[3])
            patches = split_heads(patches.flatten(2).transpose(1, 2), self.num_heads)  # (B, heads, patches, D)
            scores = (queries @ patches.transpose(-2, -1) * queries.shape[-1] ** -0.5).softmax(-1)
        shared = scores.unflatten(1, (self.kv_heads, -1)).sum(2)  # (B, kv_heads, G, patches)
        scores = self.tile_scores(shared.unflatten(-1, grid), cut)
        near = cut.distances(scores.device) < self.local
        if self.per == "token":
            near = near.repeat_interleave(cut.block[0] * cut.block[1], 0)
        chosen = top_blocks(scores.masked_fill(near, torch.inf), self.topk)
        return chosen.repeat_interleave(self.num_heads // self.kv_heads, 1)

    def tile_scores(self, scores: Tensor, cut: Blocks) -> Tensor:
        """Return the maximum over the patches that touch each tile, (..., M), of scores (..., rows, columns)."""
        for axis in (0, 1):
            scores, tile, stride, patches = scores.transpose(-2, -1), cut.block[axis], self.stride, scores.shape[-2]
            start = tile * torch.arange(cut.grid[axis], device=scores.device)[:, None]
            # Patches i from stride * i + 2 * stride > start to stride * i < start + tile
            first = (start // stride - 1).clamp(min=0)
            last = ((start + tile - 1) // stride).clamp(max=patches - 1)
            index = (first + torch.arange(ceil_div(tile, stride) + 2, device=scores.device)).minimum(last)
            scores = scores[..., index].amax(-1)
        return scores.flatten(-2)
