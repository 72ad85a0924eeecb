"""Strip self-attention of S2AFormer (Xu et al., arXiv:2505.22195).

By the paper's abstract and summaries; there is no public code. Queries and keys of one channel are those of SCASeg (the
same first author, arXiv:2411.17061). The number of heads, the scale, the absence of a position bias and the form of the
reduction are ours.
"""

from torch import Tensor, nn

from ops.functional import map_attention
from ops.registry import FIRST, Place, register_op
from ops.softmax import SoftmaxOptions
from ops.windows import pad_to_multiple

# Ratio in each stage
RATIOS = (8, 4, 2, 1)


@register_op("strip_self")
class StripSelfAttention(nn.Module):
    """All tokens attend to the tokens of a smaller map, with queries and keys of one channel for each head.

    A strided convolution and a norm compute the smaller map, after zero-padding on the right and at the bottom to a
    multiple of `ratio`. Cost is quadratic in H * W, divided by ratio².

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stage sets the default of `ratio`.
        ratio: Side of the map divided by the side of the smaller map; by default 8, 4, 2 and 1 by stage.
        qk_dim: Number of channels of each head's queries and keys; default 1.
    """

    family = "pooled"
    softmax_options = True

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, ratio: int | None = None, qk_dim: int = 1):
        super().__init__()
        ratio = RATIOS[min(place.stage, 3)] if ratio is None else ratio
        if min(ratio, qk_dim) < 1:
            raise ValueError(f"ratio and qk_dim must be at least 1, not {ratio} and {qk_dim}")
        self.num_heads, self.ratio = num_heads, ratio
        self.softmax = SoftmaxOptions(num_heads, qk_dim, place, pooling=ratio)
        self.q = nn.Linear(dim, num_heads * qk_dim)
        self.k = nn.Linear(dim, num_heads * qk_dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        if ratio > 1:
            self.reduce = nn.Conv2d(dim, dim, ratio, stride=ratio)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        sources = x
        if self.ratio > 1:
            padded = pad_to_multiple(x, (self.ratio, self.ratio)).permute(0, 3, 1, 2)
            sources = self.norm(self.reduce(padded).permute(0, 2, 3, 1))
        q, k, v = self.q(x), self.k(sources), self.v(sources)
        return self.proj(map_attention(q, k, v, self.num_heads, softmax=self.softmax))
