"""Extra tokens, such as a class token, beside a map whose tokens attend to few others."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.functional import merge_heads, split_heads


def keys_and_values(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Return the keys and the values, (B, heads, E, D) each, of queries, keys and values (B, E, 3C)."""
    _, k, v = (split_heads(t, num_heads) for t in qkv.chunk(3, dim=-1))
    return k, v


def extra_attention(extra_qkv: Tensor, qkv: Tensor, num_heads: int) -> Tensor:
    """Compute attention of extra tokens to themselves and to all tokens of a map.

    Args:
        extra_qkv: Queries, keys and values (B, E, 3C) of the extra tokens.
        qkv: Queries, keys and values (B, H, W, 3C) of the map, of which the queries are not used.
        num_heads: Number of heads.

    Returns:
        Tensor (B, E, C).
    """
    q = split_heads(extra_qkv.chunk(3, dim=-1)[0], num_heads)
    k, v = keys_and_values(torch.cat([extra_qkv, qkv.flatten(1, 2)], dim=1), num_heads)
    return merge_heads(F.scaled_dot_product_attention(q, k, v))
