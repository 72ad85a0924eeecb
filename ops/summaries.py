"""Attention with one softmax over the keys near a block of tokens and over summaries of the other blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_with_summaries(
    q: Tensor, k: Tensor, v: Tensor, summary_k: Tensor, summary_v: Tensor, mask: Tensor, scale: float | None = None
) -> Tensor:
    """Compute attention of the tokens of each of M blocks to K keys of their block and to S summaries.

    Args:
        q: Queries (B, heads, M, L, D).
        k: Keys (B, heads, M, K, D).
        v: Values (B, heads, M, K, D).
        summary_k: Keys of the summaries (B, heads, S, D).
        summary_v: Values of the summaries (B, heads, S, D).
        mask: True where a query attends to a key or a summary, which follow the keys, or a term of the scores:
            (M, 1 or L, K + S).
        scale: Factor on the scores before the softmax; by default D^-0.5.

    Returns:
        Tensor (B, heads, M, L, D).
    """
    blocks = (-1, -1, q.shape[2], -1, -1)
    k = torch.cat([k, summary_k.unsqueeze(2).expand(*blocks)], dim=3)
    v = torch.cat([v, summary_v.unsqueeze(2).expand(*blocks)], dim=3)
    # The fused kernels take four dimensions
    out = F.scaled_dot_product_attention(*(t.flatten(0, 1) for t in (q, k, v)), attn_mask=mask, scale=scale)
    return out.unflatten(0, q.shape[:2])
