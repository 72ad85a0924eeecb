"""Softplus attention with re-weighting, LSSAR (Gao and Spratling, 2025, arXiv:2501.13428).

Paper: Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models. Written after notes on
the paper, without the authors' code.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.precision import at_least_float32, without_autocast
from ops.registry import FIRST, Place, register_op
from ops.windowed import WindowedOp


@register_op("softplus")
class SoftplusAttention(WindowedOp):
    """Attention whose weights are softplus of scaled cosines, sharpened by a power of what exceeds a threshold.

    The cosine of query and key is multiplied by log(D) * log(N) for D channels and N tokens, so that the scale follows
    the size of the map. Softplus of this score is divided by its sum over the keys. The part of each weight above
    `offset` / N is raised to `power`, and divided by its sum again. A query whose weights are all below the threshold
    keeps them as they are; among at most 3 tokens the threshold is 0. Windows and padding are those of `WindowedOp`;
    cost is linear in H * W with windows, else quadratic.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stride sets the default of `window`.
        window: Side of the windows, as in `WindowedOp`.
        power: Exponent p, at least 1; default 15.
        offset: Threshold relative to uniform weights, from 0; default 1. With a power of 1 and an offset of 0 nothing
            is sharpened (LSSA).
        learned: Learn the power and the offset for each head, from these values; default False.
        qkv_bias: Give the query, key and value projections a bias; default True.
    """

    family = "local"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int | None = None,
        power: float = 15.0,
        offset: float = 1.0,
        learned: bool = False,
        qkv_bias: bool = True,
    ):
        super().__init__(place, window)
        if power < 1 or offset < 0:
            raise ValueError(f"power must be at least 1 and offset at least 0, not {power} and {offset}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.power, self.offset = power, offset
        if learned:
            self.power = nn.Parameter(torch.full((num_heads, 1, 1), float(power)))
            self.offset = nn.Parameter(torch.full((num_heads, 1, 1), float(offset)))

    def no_weight_decay(self) -> set[str]:
        return {"power", "offset"}

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, dim=-1))
        with without_autocast(x):
            q, k = (F.normalize(t, dim=-1) for t in at_least_float32(q, k))
            weights = sharpen(softplus_weights(q, k), self.power, self.offset if k.shape[-2] > 3 else 0.0)
        return self.proj(merge_heads(weights.to(v.dtype) @ v))


def softplus_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return the weights (..., N, M) between queries (..., N, D) and keys (..., M, D) of length 1; rows sum to 1."""
    M, D = k.shape[-2:]
    weights = F.softplus(q @ k.transpose(-2, -1) * (math.log(D) * math.log(M)))
    return weights / weights.sum(-1, keepdim=True)


def sharpen(weights: Tensor, power: float | Tensor, offset: float | Tensor) -> Tensor:
    """Raise to `power` the excess of weights (..., N, M) over `offset` / M; rows sum to 1 before and after.

    Rows without an excess stay as they are.
    """
    excess = F.relu(weights * weights.shape[-1] - offset)
    largest = excess.amax(-1, keepdim=True)
    exceeds = largest > 0
    # Relative to the largest one, so that powers neither overflow nor vanish
    powers = (excess / largest.where(exceeds, 1)) ** power
    return torch.where(exceeds, powers / powers.sum(-1, keepdim=True).where(exceeds, 1), weights)
