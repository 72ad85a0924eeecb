"""Spatial-reduction attention of Pyramid Vision Transformer (Wang et al., ICCV 2021, arXiv:2102.12122).

Written after the paper and the authors' repository, whai362/PVT (Apache-2.0).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op
from ops.softmax import SoftmaxOptions
from ops.windows import pad_to_multiple
from retinue.utils.arithmetic import ceil_div

# Ratio in each stage of the paper's nets
RATIOS = (8, 4, 2, 1)


@register_op("spatial_reduction")
class SpatialReductionAttention(nn.Module):
    """All tokens attend to the tokens of a smaller map, which a strided convolution and a norm compute.

    The map is zero-padded on the right and at the bottom to a multiple of `ratio`. Extra tokens are queries, keys and
    values without reduction. Cost is quadratic in H * W, divided by ratio².

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stage sets the default of `ratio`.
        ratio: Side of the map divided by the side of the smaller map; by default 8, 4, 2 and 1 by stage, as in the
            paper.
        qkv_bias: Give the query, key and value projections a bias; default True.
    """

    family = "pooled"
    takes_extra = True
    softmax_options = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        ratio: int | None = None,
        qkv_bias: bool = True,
    ):
        super().__init__()
        ratio = RATIOS[min(place.stage, 3)] if ratio is None else ratio
        if ratio < 1:
            raise ValueError(f"ratio must be at least 1, not {ratio}")
        self.num_heads, self.ratio = num_heads, ratio
        self.softmax = SoftmaxOptions(num_heads, dim // num_heads, place, pooling=ratio)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if ratio > 1:
            self.sr = nn.Conv2d(dim, dim, ratio, stride=ratio)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        size, tokens, sources = x.shape[1:3], x.flatten(1, 2), self.reduce(x)
        if extra is not None:
            tokens, sources = (torch.cat([extra, t], dim=1) for t in (tokens, sources))
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q(tokens), *self.kv(sources).chunk(2, dim=-1)))
        q, k, scale = self.softmax(q, k, size, [ceil_div(n, self.ratio) for n in size])
        out = self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v, scale=scale)))
        if extra is None:
            return out.unflatten(1, size)
        E = extra.shape[1]
        return out[:, E:].unflatten(1, size), out[:, :E]

    def reduce(self, x: Tensor) -> Tensor:
        """Return the tokens of the smaller map: (B, ⌈H / ratio⌉ * ⌈W / ratio⌉, C)."""
        if self.ratio == 1:
            return x.flatten(1, 2)
        x = pad_to_multiple(x, (self.ratio, self.ratio))
        return self.norm(self.sr(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2))
