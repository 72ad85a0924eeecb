"""Sparsifiner: attention along a predicted sparse pattern (Wei et al., CVPR 2023, arXiv:2303.13755).

Paper: Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers. Written after the
paper and the authors' repository, lim142857/Sparsifiner (MIT).
"""

from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.losses import Losses
from ops.registry import FIRST, Place, register_op
from retinue.utils.arithmetic import ceil_div


def resize_basis(table: Tensor, extra: int, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Interpolate a table (extra + h * w, K) of a grid (h, w) bilinearly to (extra + H * W, K) of `size` (H, W)."""
    if grid == size:
        return table
    on_map = table[extra:].T.unflatten(1, grid)[None]
    return torch.cat([table[:extra], F.interpolate(on_map, size, mode="bilinear")[0].flatten(1).T])


class MaskPredictor(nn.Module):
    """Predict which keys each query attends to, from a low-rank approximation of the attention.

    A query's coefficients are its attention to `basis` mixtures of all keys. A learned basis turns the largest
    coefficients back into scores of all keys, and the keys with the highest scores are chosen.

    Args:
        head_dim: Channels of a head.
        num_heads: Number of heads.
        size: Size (H, W) of the map that the mixtures and the basis are learned for.
        extra: Number of extra tokens, such as a class token.
        keep: Share of all tokens that each query attends to.
        basis: Number of mixtures.
        coefficients: Number of largest coefficients that count.
        threshold: Entries of the basis up to this magnitude count as zero.
    """

    def __init__(
        self, head_dim: int, num_heads: int, size: tuple[int, int], extra: int, keep: float, basis: int,
        coefficients: int, threshold: float,
    ):  # fmt: skip
        super().__init__()
        self.size, self.extra, self.keep = size, extra, keep
        self.coefficients, self.threshold = min(coefficients, basis), threshold
        # The authors scale by the number of heads, not by the channels of a head.
        self.scale = num_heads**-0.5
        self.proj_c_q = nn.Linear(head_dim, max(head_dim // 2, 1))
        self.proj_c_k = nn.Linear(head_dim, max(head_dim // 2, 1))
        # The authors' names: from the tokens to the mixtures, and back
        tokens = extra + size[0] * size[1]
        self.proj_n = nn.Parameter(trunc_normal_(torch.empty(tokens, basis), std=0.02))
        self.proj_back_n = nn.Parameter(trunc_normal_(torch.empty(tokens, basis), std=0.02))

    def resize_table(self, name: str, value: Tensor) -> Tensor:
        """Interpolate a checkpoint's table, learned for a square map, to this module's size, for `load_weights`."""
        side = round((value.shape[0] - self.extra) ** 0.5)
        if value.ndim != 2 or not name.startswith("proj_") or self.extra + side**2 != value.shape[0]:
            return value
        return resize_basis(value, self.extra, (side, side), self.size)

    def forward(
        self, q: Tensor, k: Tensor, size: tuple[int, int], alive: Tensor | None = None, limit: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the pattern and the approximated attention that a loss compares with the attention itself.

        Args:
            q: Queries (B, heads, E + N, D).
            k: Keys (B, heads, E + N, D).
            size: Size (H, W) of the map, of N tokens.
            alive: False for tokens that were pruned, (B, N).
            limit: Largest number of keys of a query; None: all.

        Returns:
            True where a query attends to a key, (B, heads, E + N, E + N), and the approximation (B, heads, N, E + N).
            Extra tokens attend to all tokens.
        """
        E = q.shape[2] - size[0] * size[1]
        # Extra tokens for which nothing is learned take no part in the mixtures, and padding by less than 0 crops.
        mixtures, basis = (
            F.pad(resize_basis(table, self.extra, self.size, size), (0, 0, E - self.extra, 0))
            for table in (self.proj_n, self.proj_back_n)
        )
        q, k = self.proj_c_q(q), self.proj_c_k(k)
        if alive is not None:
            pruned = F.pad(~alive, (E, 0))[:, None, :, None]
            q, k = q.masked_fill(pruned, 0), k.masked_fill(pruned, 0)
        coefficients = (q @ (k.transpose(-2, -1) @ mixtures) * self.scale)[:, :, E:].softmax(-1)
        approximation = coefficients @ basis.T
        with torch.no_grad():
            largest = coefficients.topk(self.coefficients, sorted=False)
            coefficients = torch.zeros_like(coefficients).scatter(-1, largest.indices, largest.values)
            scores = coefficients @ F.threshold(basis.T.abs(), self.threshold, 0.0)
            budget = min(ceil(self.keep * q.shape[2]), q.shape[2] if limit is None else limit)
            if alive is not None:
                scores = scores.masked_fill(F.pad(~alive, (E, 0))[:, None, None], -torch.inf)
            chosen = torch.zeros_like(scores, dtype=torch.bool)
            chosen = chosen.scatter(-1, scores.topk(budget, sorted=False).indices, True)
        return F.pad(chosen, (0, 0, E, 0), value=True), approximation


@register_op("sparsifiner")
class SparsifinerAttention(nn.Module):
    """Each token attends to the tokens that a predictor chooses for it and for each head; extra tokens attend to all.

    The choice passes no gradient. The predictor learns by the loss `connectivity`, the squared distance, for each
    image, of the predictor's approximation to the attention to all tokens. The pattern is a dense mask, so cost is
    quadratic in H * W. The predictor's tables are interpolated for maps of another size.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stride sets the default of `size`; `extra` is the number of extra tokens that the tables have.
        keep: Share of all tokens that each token attends to, above 0 and at most 1; default 0.25.
        basis: Number of mixtures of keys that approximate the attention; default 32.
        coefficients: Number of mixtures that count for each token; default 8.
        threshold: Entries of the basis up to this magnitude count as zero; default 0.02.
        size: Size (H, W) of the map for which the tables are learned, or one number for both; by default the size at an
            image of 224 pixels.
        qkv_bias: Give the query, key and value projections a bias; default True.

    Raises:
        ValueError: A value is out of its range.
    """

    family = "sparse"
    takes_extra = True
    loss_weights: tuple[tuple[str, float], ...] = (("connectivity", 0.01),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        keep: float = 0.25,
        basis: int = 32,
        coefficients: int = 8,
        threshold: float = 0.02,
        size: int | tuple[int, int] | None = None,
        qkv_bias: bool = True,
    ):
        super().__init__()
        H, W = map(int, to_2tuple(ceil_div(224, place.stride) if size is None else size))
        if not 0 < keep <= 1 or min(basis, coefficients, H, W) < 1:
            raise ValueError(
                f"keep must be above 0 and at most 1, and basis, coefficients and size at least 1, "
                f"not {keep}, {basis}, {coefficients} and {size}"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.mask_predictor = MaskPredictor(
            dim // num_heads, num_heads, (H, W), place.extra, keep, basis, coefficients, threshold
        )

    def forward(self, x: Tensor, extra: Tensor | None = None, losses: Losses | None = None) -> Any:
        size, E = (x.shape[1], x.shape[2]), 0 if extra is None else extra.shape[1]
        tokens = x.flatten(1, 2) if extra is None else torch.cat([extra, x.flatten(1, 2)], dim=1)
        out, _ = self.attend(tokens, size, losses=losses)
        x = out[:, E:].unflatten(1, size)
        return x if extra is None else (x, out[:, :E])

    def attend(
        self,
        tokens: Tensor,
        size: tuple[int, int],
        alive: Tensor | None = None,
        limit: int | None = None,
        losses: Losses | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the output for tokens (B, E + N, C) and the attention (B, heads, E + N, E + N).

        Args:
            tokens: Extra tokens, then a map of `size` (H, W).
            size: Size of the map, of N tokens.
            alive: False for tokens that were pruned, (B, N).
            limit: Largest number of keys of a query; None: all.
            losses: Receives the loss `connectivity`.
        """
        q, k, v = split_heads(self.qkv(tokens), 3 * self.num_heads).chunk(3, dim=1)
        if alive is not None:
            pruned = F.pad(~alive, (tokens.shape[1] - alive.shape[1], 0))[:, None, :, None]
            q, k, v = (t.masked_fill(pruned, 0) for t in (q, k, v))
        pattern, approximation = self.mask_predictor(q, k, size, alive, limit)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if losses is not None:
            target = scores.detach().softmax(-1)[:, :, -approximation.shape[2] :]
            losses.add("connectivity", (approximation - target).square().sum() / len(tokens))
        weights = scores.masked_fill(~pattern, -torch.inf).softmax(-1)
        return self.proj(merge_heads(weights @ v)), weights
