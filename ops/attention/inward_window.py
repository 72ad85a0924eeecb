"""Inward sliding windows of FreeSwim, for dense attention on maps that are larger than in training.

Paper: FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free Ultra-High-Resolution Video Generation
(arXiv:2511.14712). Written after the paper and what the authors' repository, WillWu111/FreeSwim (no licence), computes.
The authors' second path feeds the attention to the text. Here the extra tokens take the place of the text, which is
our mapping.
"""

import math
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from ops.extra import extra_attention
from ops.functional import map_attention
from ops.neighborhood import neighborhood_attention, tiled_attention
from ops.norm import RMSNorm
from ops.registry import FIRST, Place, register_op


@register_op("inward_window")
class InwardWindowAttention(nn.Module):
    """Tokens attend to a window around them, which is moved inside where the map ends, and to extra tokens.

    A window that is larger than the map is cut to the map. With the default window, the op is full attention on maps up
    to the size of training, has the same weights as the op `full`, and keeps the number of keys per query on larger
    maps. Extra tokens attend to all tokens. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stride sets the default of `train_size`.
        train_size: Size of the map in training, in tokens: one number, or one along H and one along W; by default that
            of images of 224 pixels.
        window: Size of the window in tokens, odd: one number, or one along H and one along W. By default the smallest
            odd number that is at least `train_size`.
        temperature: Factor on the scores: a number, or "entropy" for √(ln(keys) / ln(keys in training)), which keeps
            the entropy of the attention; default 1. The authors have √(ln(2 n) / ln(n)) = 1.046 for n = 1560.
        qk_norm: Normalise queries and keys over all channels (RMSNorm), as the authors' host net does; default False.
    """

    family = "local"
    takes_extra = True
    renames = ((r"^to_([qkv])\.", r"\1."), (r"^to_out\.0\.", "proj."))

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        train_size: int | tuple[int, int] | None = None,
        window: int | tuple[int, int] | None = None,
        temperature: float | str = 1.0,
        qk_norm: bool = False,
    ):
        super().__init__()
        # Any, because the annotation of to_2tuple does not say that it returns a pair
        pair: Any = to_2tuple
        self.train_size = pair(max(224 // place.stride, 1) if train_size is None else train_size)
        if min(self.train_size) < 1:
            raise ValueError(f"train_size must be at least 1, not {train_size}")
        self.window = tuple(n + 1 - n % 2 for n in self.train_size) if window is None else pair(window)
        if min(self.window) < 1 or not all(w % 2 for w in self.window):
            raise ValueError(f"window must be odd, not {window}")
        if temperature != "entropy" and (isinstance(temperature, str) or temperature <= 0):
            raise ValueError(f"temperature must be a number above 0 or 'entropy', not {temperature!r}")
        self.num_heads, self.temperature = num_heads, temperature
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm_q, self.norm_k = (RMSNorm(dim, 1e-5) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        size, E = x.shape[1:3], 0 if extra is None else extra.shape[1]
        window = (min(self.window[0], size[0]), min(self.window[1], size[1]))
        q, k, v = self.project(x)
        extra_q, extra_k, extra_v = self.project(x.new_empty(x.shape[0], 0, x.shape[3]) if extra is None else extra)
        q = q * self.factor(window[0] * window[1] + E, E)
        if window == size:
            keys, values = (torch.cat([t.flatten(1, 2), e], 1) for t, e in ((k, extra_k), (v, extra_v)))
            out = map_attention(q, keys.unsqueeze(1), values.unsqueeze(1), self.num_heads)
        elif E:
            shared = torch.cat([extra_k, extra_v], dim=-1).unsqueeze(1)
            rule = (window, (1, 1), (1, 1), (False, False))
            out = tiled_attention(torch.cat([q, k, v], dim=-1), None, self.num_heads, *rule, shared=shared)
        else:
            out = neighborhood_attention(torch.cat([q, k, v], dim=-1), None, self.num_heads, window)
        if extra is None:
            return self.proj(out)
        extra_q = extra_q * self.factor(size[0] * size[1] + E, E)
        extra_qkv, qkv = (torch.cat(t, dim=-1) for t in ((extra_q, extra_k, extra_v), (q, k, v)))
        return self.proj(out), self.proj(extra_attention(extra_qkv, qkv, self.num_heads))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each of the shape of `x`."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.norm_q(q), self.norm_k(k), v

    def factor(self, keys: int, extra: int) -> float:
        """Return the factor on the scores of queries that attend to `keys` keys, if there are `extra` extra tokens."""
        if self.temperature != "entropy":
            return float(self.temperature)
        trained = self.train_size[0] * self.train_size[1] + extra
        return math.sqrt(math.log(max(keys, 2)) / math.log(max(trained, 2)))
