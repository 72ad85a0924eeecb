"""Rectification of attention to chosen blocks by the pooled attention to the blocks that were left out.

Paper: Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation (Liu et al., 2025,
arXiv:2511.19835). Written after the description of the authors' repository, BienLuky/Rectified-SpaAttn. Blocks are
rectangles of a map here, and blocks at the end of the map weigh by the number of their tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ops.blocks import Blocks
from ops.precision import at_least_float32, without_autocast


class PooledAttention(NamedTuple):
    """Attention between the means of M blocks.

    Attributes:
        weights: Weight of each key block for each query block, (B, heads, M, M); a row and its extra mass sum to 1.
        trusted: True where the scores inside a pair of blocks differ so little that the pair's weight may stand for its
            tokens, (B, heads, M, M).
        extra_mass: Weight of all extra tokens together, (B, heads, M, 1); 0 without extra tokens.
    """

    weights: Tensor
    trusted: Tensor
    extra_mass: Tensor


def pooled_attention(
    q: Tensor, k: Tensor, cut: Blocks, extra_k: Tensor | None = None, scale: float | None = None
) -> PooledAttention:
    """Compute attention between the means of blocks, in float32 at least.

    A pair of blocks is trusted if the product of its means is larger than the products of each mean with the other
    block's mean absolute deviation.

    Args:
        q: Queries (B, heads, M, L, D).
        k: Keys (B, heads, M, L, D).
        cut: Blocks; the means are over their tokens that are on the map.
        extra_k: Keys (B, heads, E, D) of extra tokens, which are not pooled; by default none.
        scale: Factor on the scores before the softmax; by default D^-0.5.
    """
    with without_autocast(q):
        q, k = at_least_float32(q, k)
        q_mean, k_mean = cut.means(q), cut.means(k)
        q_spread, k_spread = (cut.means((x - mean.unsqueeze(-2)).abs()) for x, mean in ((q, q_mean), (k, k_mean)))
        scores = q_mean @ k_mean.transpose(-2, -1)
        error = (q_spread @ k_mean.transpose(-2, -1)).abs() + (q_mean @ k_spread.transpose(-2, -1)).abs()
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        logits = scores * factor + cut.real(q.device).sum(-1).to(q.dtype).log()
        if extra_k is not None:
            extra_logits = q_mean @ extra_k.to(q.dtype).transpose(-2, -1) * factor
            logits = torch.cat([logits, extra_logits], dim=-1)
        weights = logits.softmax(-1)
    blocks = k_mean.shape[-2]
    return PooledAttention(weights[..., :blocks], scores.abs() > error, weights[..., blocks:].sum(-1, keepdim=True))


def rectify(out: Tensor, pooled: PooledAttention, kept: Tensor, v_means: Tensor) -> Tensor:
    """Scale attention to kept blocks down and add the mean values of the trusted blocks that were not kept.

    Blocks that are neither kept nor trusted leave their weight to the kept ones, so the weights still sum to 1.

    Args:
        out: Output (B, heads, G, Q, D) of attention to the kept blocks; each of M blocks has G / M groups of queries.
        pooled: Attention between the blocks.
        kept: True where a group attended to a block, (B, heads, G, M).
        v_means: Mean values of the blocks, (B, heads, M, D).

    Returns:
        Tensor (B, heads, G, Q, D).
    """
    kept = kept.unflatten(2, (v_means.shape[2], -1))  # (B, heads, M, G / M, M)
    rest = pooled.weights.unsqueeze(3) * (pooled.trusted.unsqueeze(3) & ~kept)
    with without_autocast(out):
        added = (rest @ v_means.to(rest.dtype).unsqueeze(2)).flatten(2, 3).unsqueeze(-2)  # (B, heads, G, 1, D)
        share = 1 - rest.sum(-1).flatten(2, 3)[..., None, None]
        return (share * out + added).to(out.dtype)
