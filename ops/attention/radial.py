"""Radial attention: a static pattern whose windows shrink with the distance.

Paper: Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation (Li et al., 2025,
arXiv:2506.19852). Written after the paper and the authors' repository, mit-han-lab/radial-attention (Apache-2.0). The
paper's frames and the tokens of a frame are the rows of a map and the tokens of a row here. The paper widens windows to
whole blocks of 64 or 128 tokens; here the pattern holds for single tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ops.extra import extra_attention, keys_and_values
from ops.offsets import band_attention
from ops.registry import FIRST, Place, register_op


@register_op("radial")
class RadialAttention(nn.Module):
    """Tokens attend to their row and the adjacent rows, and in rows further away to windows that shrink.

    At a distance of d rows with 2^(g - 1) <= d < 2^g, the window reaches `decay` * 2^(b - g) tokens to both sides, but
    at least `min_width`, where b is the number of binary digits of the width of the map. Where 2^(b - g) is less than
    `min_width`, only every (min_width / 2^(b - g))-th row is attended to. Extra tokens are attended to by all tokens
    and attend to all tokens. Cost is H * W times about W times the logarithm of H.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        min_width: Minimum reach of a window in tokens; default 1.
        decay: Factor on the reach of the windows; default 1.
        symmetric: Also attend to the tokens that the same rule gives with rows and columns exchanged; default False.
        sink: Also attend to the whole first row; default False.
    """

    family = "sparse"
    takes_extra = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        min_width: int = 1,
        decay: float = 1.0,
        symmetric: bool = False,
        sink: bool = False,
    ):
        super().__init__()
        if min_width < 1 or decay <= 0:
            raise ValueError(f"min_width must be at least 1 and decay positive, not {min_width} and {decay}")
        self.num_heads, self.min_width, self.decay = num_heads, min_width, decay
        self.symmetric, self.sink = symmetric, sink
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        H, W = x.shape[1:3]
        qkv = self.qkv(x)
        extra_qkv = None if extra is None else self.qkv(extra)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).movedim(3, 1) for t in qkv.chunk(3, dim=-1))
        # With a sink, the first row is attended to as further tokens, and not as a row
        sinks = [t for t in (extra_qkv, qkv[:, 0] if self.sink else None) if t is not None]
        further = keys_and_values(torch.cat(sinks, dim=1), self.num_heads) if sinks else None
        out = band_attention(q, k, v, *self.pattern(H, W, x.device), further, int(self.sink))
        out = self.proj(out.movedim(1, 3).flatten(3))
        if extra_qkv is None:
            return out
        return out, self.proj(extra_attention(extra_qkv, qkv, self.num_heads))

    def pattern(self, H: int, W: int, device: torch.device | str) -> tuple[Tensor, list[int]]:
        """Return the arguments `allowed` and `reach` of `band_attention` for a map of H x W tokens."""
        reach, transposed = self.reach(H, W), self.reach(W, H)
        dy, dx = (torch.arange(1 - n, n, device=device).abs() for n in (H, W))
        allowed = torch.tensor(reach, device=device)[dy][:, None] >= dx
        if self.symmetric:
            allowed = allowed | (torch.tensor(transposed, device=device)[dx] >= dy[:, None])
            widest = [max((d for d in range(W) if transposed[d] >= distance), default=-1) for distance in range(H)]
            reach = [max(pair) for pair in zip(reach, widest, strict=True)]
        return allowed, reach

    def reach(self, lines: int, length: int) -> list[int]:
        """Return how far windows reach in lines of `length` tokens, at each distance of 0 to lines - 1; -1 for none."""
        reach = []
        for distance in range(lines):
            decayed = 2.0 ** (length.bit_length() - distance.bit_length())
            if decayed < self.min_width and distance % int(self.min_width / decayed):
                reach.append(-1)
            else:
                width = length if distance <= 1 else int(max(decayed * self.decay, self.min_width))
                reach.append(min(width, length - 1))
        return reach
