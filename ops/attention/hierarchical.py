"""Hierarchical self-attention on a tree of blocks.

Paper: Hierarchical Self-Attention: Generalizing Neural Attention Mechanics to Multi-Scale Problems (2025,
arXiv:2509.15448), which has no public code. The op follows the paper's principle: among attention maps whose weights
are equal for all pairs of tokens from the same two branches, take the one closest to softmax attention in the sense of
the Kullback-Leibler divergence. The form for maps, with windows as the lowest blocks, is our derivation.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ops.blocks import Blocks, fit_block
from ops.precision import at_least_float32, without_autocast
from ops.registry import FIRST, Place, register_op

NORMALIZATIONS = ("row", "block")


@register_op("hierarchical")
class HierarchicalSelfAttention(nn.Module):
    """Tokens attend to the tokens of their window, and to the means of other windows and of ever larger blocks.

    The blocks of each level lie side by side in a block of the next level. A block attends to the other blocks of the
    same larger block: the score is the product of mean query and mean key, weighted by the number of tokens, and the
    value is the mean value. So the weight of a token far away is that of all tokens of its block. With windows of one
    token and one level this is full attention. Padded tokens are neither attended to nor counted. Cost is H * W times
    the tokens of a window, and quadratic in the number of windows with one level, or linear with `branch`.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        window: Side of a window in tokens; default 7.
        branch: Number of blocks along each side of the next larger block, at least 2, until one block holds the map. By
            default there is one level: all windows attend to each other.
        normalize: "row" (default): the weights of each token follow from its own scores. "block": the share of the
            other blocks is the same for all tokens of a block, as the principle strictly demands.
    """

    family = "mixed"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int = 7,
        branch: int | None = None,
        normalize: str = "row",
    ):
        super().__init__()
        if window < 1 or (branch is not None and branch < 2):
            raise ValueError(f"window must be at least 1 and branch at least 2, not {window} and {branch}")
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize must be one of {', '.join(NORMALIZATIONS)}, not {normalize!r}")
        self.num_heads, self.window, self.branch, self.normalize = num_heads, window, branch, normalize
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        cut = fit_block((self.window, self.window), (x.shape[1], x.shape[2]))
        q, k, v = (cut.split(t, self.num_heads) for t in self.qkv(x).chunk(3, dim=-1))  # (B, heads, M, L, D)
        real = cut.real(x.device)
        scale = q.shape[-1] ** -0.5
        with without_autocast(x):
            q, k, v = at_least_float32(q, k, v)
            scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~real.unsqueeze(1), -torch.inf)
            # Logarithm of the sum of each token's weights before they are normalised
            total, out = scores.logsumexp(-1, keepdim=True), scores.softmax(-1) @ v
            level = Level(cut.means(q), cut.means(k), cut.means(v), real.sum(-1).to(q.dtype), cut.grid)
            members = Blocks(cut.grid, (1, 1))
            while level.grid != (1, 1):
                index = block_of_window(members, x.device)
                if self.normalize == "block":
                    total = block_mean(total, real, members, level.count).index_select(2, index).unsqueeze(3)
                side = level.grid if self.branch is None else (self.branch, self.branch)
                parents = fit_block(side, level.grid)
                peak, weight, values = (t.index_select(2, index).unsqueeze(3) for t in siblings(level, parents, scale))
                top = torch.maximum(peak, total.detach())
                far, near = (peak - top).exp(), (total - top).exp()
                weights = far * weight + near
                out, total = (far * values + near * out) / weights, top + weights.log()
                level = merge(level, parents)
                rows, columns = members.block
                members = Blocks(cut.grid, (rows * parents.block[0], columns * parents.block[1]))
        return self.proj(cut.join(out).to(x.dtype))


class Level(NamedTuple):
    """Blocks of one level of the tree.

    Attributes:
        q: Mean queries (B, heads, G, D) of the G blocks.
        k: Mean keys (B, heads, G, D).
        v: Mean values (B, heads, G, D).
        count: Number of tokens of each block, (G,).
        grid: Number of blocks along H and W.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    count: Tensor
    grid: tuple[int, int]

    def families(self, parents: Blocks) -> list[Tensor]:
        """Return q, k, v and count with the blocks cut into P families of S: (B * heads, P, S, D), (1, P, S, 1)."""
        maps = [t.flatten(0, 1).unflatten(1, self.grid) for t in (self.q, self.k, self.v)]
        return [parents.split(t, 1).squeeze(1) for t in (*maps, self.count.view(1, *self.grid, 1))]


def siblings(level: Level, parents: Blocks, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the attention of each block to the other blocks of its larger block, not normalised.

    Args:
        level: The blocks.
        parents: Cut of the level's grid into larger blocks.
        scale: Factor on the scores.

    Returns:
        Maximum of the scores and sum of the weights, (B, heads, G, 1), and weighted values, (B, heads, G, D). The
        weights are relative to the maximum. Without other blocks the sum and the values are 0.
    """
    q, k, v, count = level.families(parents)
    scores = q @ k.transpose(-2, -1) * scale + count.transpose(-2, -1).log()
    itself = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
    scores = scores.masked_fill(itself, -torch.inf)
    peak = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - peak).exp()
    parts = (t.unsqueeze(1) for t in (peak, weights.sum(-1, keepdim=True), weights @ v))
    peak, weight, values = (parents.join(t).flatten(1, 2).unflatten(0, level.q.shape[:2]) for t in parts)
    return peak, weight, values


def merge(level: Level, parents: Blocks) -> Level:
    """Return the next level, whose blocks are the larger blocks of this level."""
    *tensors, count = level.families(parents)
    total = count.sum(-2)
    q, k, v = (((t * count).sum(-2) / total).unflatten(0, level.q.shape[:2]) for t in tensors)
    return Level(q, k, v, total.flatten(), parents.grid)


def block_of_window(members: Blocks, device: torch.device) -> Tensor:
    """Return the index of the block that holds each of the M windows, (M,), for the cut of windows into blocks."""
    rows, columns = (torch.arange(n, device=device) // b for n, b in zip(members.size, members.block, strict=True))
    return (rows[:, None] * members.grid[1] + columns).flatten()


def block_mean(total: Tensor, real: Tensor, members: Blocks, count: Tensor) -> Tensor:
    """Return the average over the tokens of each block, (B, heads, G, 1).

    Args:
        total: A value for each token of the M windows, (B, heads, M, L or 1, 1).
        real: True for tokens on the map, (M, L).
        members: Cut of the windows into G blocks.
        count: Number of tokens of each block, (G,).
    """
    sums = (total.squeeze(-1) * real).sum(-1)  # (B, heads, M)
    maps = sums.flatten(0, 1).unflatten(1, members.size).unsqueeze(-1)
    sums = members.split(maps, 1).sum(-2).view(*sums.shape[:2], -1, 1)
    return sums / count.unsqueeze(-1)
