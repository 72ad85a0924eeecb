"""Core context aware attention, CCA (Chen et al., ICML 2025, arXiv:2412.12465).

Paper: Core Context Aware Transformers for Long Context Language Modeling. Written after the paper; the repository
chenyaofo/CCA-Attention holds no code of the attention. With `causal` the op is the paper's. The form for maps, in which
groups are tiles, every token attends to tokens on all sides, and a mean query weights a tile's tokens, is ours.
"""

import torch
from torch import Tensor, nn

from ops.blocks import Blocks, fit_block
from ops.registry import FIRST, Place, register_op
from ops.summaries import attend_with_summaries

EVALUATORS = ("mean", "center", "last")


@register_op("core_context")
class CoreContextAttention(nn.Module):
    """Tokens attend in one softmax to the tokens of near tiles and to one core token for each other tile.

    A tile's core token is the mean of its tokens, weighted in each head by the attention of an evaluator, a query of
    the tile. Every token of the map counts once, itself or in a core token. Tiles that do not fit the map hold fewer
    tokens, so nothing is padded. Cost is H * W * (tokens of near tiles + number of tiles).

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        tile: Side of a tile in tokens; default 4.
        reach: Largest distance of near tiles, in tiles along H and W; default 1, so 3 x 3 tiles. 0: the own tile only.
        evaluator: Query that weights the tokens of a tile: "mean", that of all queries, "center" or "last", that of a
            token; by default "mean", and "last" with `causal`, as in the paper.
        log_count: Add the logarithm of the number of a tile's tokens to the scores of its core token, so that a tile of
            equal tokens counts as these tokens do; default False.
        causal: Attend to no later token, in row-major order. Groups of `group` consecutive tokens replace the tiles. A
            token attends to the last `window` tokens and those before them up to the end of a group, and to the core
            tokens of the groups before. Default False.
        group: Number of tokens of a group with `causal`; default 16.
        window: Smallest number of near tokens with `causal`; default 1024.

    Raises:
        ValueError: A value is unknown or out of its range.
    """

    family = "mixed"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        tile: int = 4,
        reach: int = 1,
        evaluator: str | None = None,
        log_count: bool = False,
        causal: bool = False,
        group: int = 16,
        window: int = 1024,
    ):
        super().__init__()
        if evaluator is None:
            evaluator = "last" if causal else "mean"
        if evaluator not in EVALUATORS:
            raise ValueError(f"evaluator must be one of {', '.join(EVALUATORS)}, not {evaluator!r}")
        if min(tile, group, window) < 1 or reach < 0:
            raise ValueError(
                f"tile, group and window must be at least 1 and reach at least 0, not {tile}, {group}, {window} and "
                f"{reach}"
            )
        self.num_heads, self.tile, self.reach, self.evaluator = num_heads, tile, reach, evaluator
        self.log_count, self.causal, self.group, self.window = log_count, causal, group, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if self.causal:
            qkv = qkv.flatten(1, 2).unsqueeze(1)  # (B, 1, H * W, 3C)
        blocks = self.cut((qkv.shape[1], qkv.shape[2]))
        q, k, v = blocks.split(qkv, 3 * self.num_heads).chunk(3, dim=1)  # (B, heads, M, L, D)
        real = blocks.real(x.device)  # (M, L)
        scores = self.evaluate(q, blocks) @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~real.unsqueeze(1), -torch.inf).softmax(-1)
        core_k, core_v = ((weights @ t).squeeze(3) for t in (k, v))

        near, mask = self.plan(blocks, x.device)
        if self.log_count:
            counts = torch.cat([torch.zeros(near.shape[1] * k.shape[3], device=x.device), real.sum(-1).log()])
            mask = counts.masked_fill(~mask, -torch.inf).to(q.dtype)
        near_k, near_v = (t[:, :, near].flatten(3, 4) for t in (k, v))  # (B, heads, M, near * L, D)
        out = blocks.join(attend_with_summaries(q, near_k, near_v, core_k, core_v, mask))
        return self.proj(out.reshape(x.shape))

    def cut(self, size: tuple[int, int]) -> Blocks:
        """Return the tiles of a map of `size` (H, W), or the groups of a row of tokens (1, H * W) with `causal`."""
        return fit_block((1, self.group) if self.causal else (self.tile, self.tile), size)

    def evaluate(self, q: Tensor, blocks: Blocks) -> Tensor:
        """Return the evaluator of each tile, (B, heads, M, 1, D), for queries (B, heads, M, L, D)."""
        if self.evaluator == "mean":
            return blocks.means(q).unsqueeze(3)
        offsets = []
        for side, length, number in zip(blocks.size, blocks.block, blocks.grid, strict=True):
            present = (side - length * torch.arange(number, device=q.device)).clamp(max=length)
            offsets.append(present // 2 if self.evaluator == "center" else present - 1)
        index = (offsets[0][:, None] * blocks.block[1] + offsets[1]).view(-1, 1, 1)
        return q.take_along_dim(index.expand(*q.shape[:2], -1, -1, -1), 3)

    def plan(self, blocks: Blocks, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the near tiles of each tile, and which of their tokens and of all core tokens a query attends to.

        Returns:
            Indices of the tiles (M, near), which repeat where fewer tiles are near, and a mask (M, 1, near * L + M), or
            (M, L, near * L + M) with `causal`.
        """
        (rows, columns), M = blocks.grid, blocks.number
        real = blocks.real(device)
        tiles = torch.arange(M, device=device)
        if self.causal:
            return self.causal_plan(tiles, real)
        row, column = tiles // columns, tiles % columns
        offset = lambda n: torch.arange(-min(self.reach, n - 1), min(self.reach, n - 1) + 1, device=device)  # noqa: E731
        near_row = (row[:, None] + offset(rows)).unsqueeze(2)  # (M, rows, 1)
        near_column = (column[:, None] + offset(columns)).unsqueeze(1)  # (M, 1, columns)
        exists = ((near_row >= 0) & (near_row < rows) & (near_column >= 0) & (near_column < columns)).flatten(1)
        near = (near_row.clamp(0, rows - 1) * columns + near_column.clamp(0, columns - 1)).flatten(1)
        tokens = (exists.unsqueeze(2) & real[near]).flatten(1)
        return near, torch.cat([tokens, blocks.distances(device) > self.reach], dim=1).unsqueeze(1)

    def causal_plan(self, groups: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Return the result of `plan` with `causal` for the M groups `groups` and their `real` tokens (M, L)."""
        M, L = real.shape
        # Groups that the core tokens of the first query of a group leave out, at most all
        count = min((self.window + L - 2) // L + 1, M)
        near = groups[:, None] - torch.arange(count - 1, -1, -1, device=groups.device)  # (M, near)
        offset = torch.arange(L, device=groups.device)
        queries = groups[:, None] * L + offset
        cores = ((queries + 1 - self.window) // L).clamp(min=0).unsqueeze(2)  # (M, L, 1)
        keys = (near.unsqueeze(2) * L + offset).flatten(1).unsqueeze(1)  # (M, 1, near * L)
        tokens = (keys >= cores * L) & (keys <= queries.unsqueeze(2))
        return near.clamp(min=0), torch.cat([tokens, groups < cores], dim=2)
