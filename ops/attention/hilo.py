"""HiLo attention of LITv2 (Pan et al., NeurIPS 2022, arXiv:2205.13213).

Written after the paper and the authors' repository, ziplab/LITv2 (Apache-2.0).
"""

import torch
from torch import Tensor, nn

from ops.functional import map_attention, window_attention
from ops.registry import FIRST, Place, register_op
from ops.softmax import SoftmaxOptions
from ops.windows import pad_to_multiple, window_means


@register_op("hilo")
class HiLoAttention(nn.Module):
    """Some heads attend inside small windows (high frequencies), the others to the means of the windows (low ones).

    The map is zero-padded on the right and at the bottom to a multiple of the window; padded tokens are projected,
    attended to and counted in the means. Cost is quadratic in H * W, divided by window².

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stage sets the default of `window`.
        window: Side of a window in tokens, where 1 gives full attention; by default 2, and 1 from the fourth stage on.
        alpha: Share of the heads for low frequencies, in (0, 1], rounded down, but at least one head; default 0.9.
        qkv_bias: Give the query, key and value projections a bias; default True.
    """

    family = "mixed"
    softmax_options = True
    renames = ((r"^h_", "high_"), (r"^l_", "low_"))
    value_layers, output_layers = ("high_qkv", "low_kv"), ("high_proj", "low_proj")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int | None = None,
        alpha: float = 0.9,
        qkv_bias: bool = True,
    ):
        super().__init__()
        window = (2 if place.stage < 3 else 1) if window is None else window
        if window < 1 or not 0 < alpha <= 1:
            raise ValueError(f"window must be at least 1 and alpha in (0, 1], not {window} and {alpha}")
        self.num_heads, self.window = num_heads, window
        self.low_heads = num_heads if window == 1 else max(int(num_heads * alpha), 1)
        self.high_heads = num_heads - self.low_heads
        low, high = (heads * dim // num_heads for heads in (self.low_heads, self.high_heads))
        if high:
            self.high_qkv = nn.Linear(dim, 3 * high, bias=qkv_bias)
            self.high_proj = nn.Linear(high, high)
        self.low_q = nn.Linear(dim, low, bias=qkv_bias)
        self.low_kv = nn.Linear(dim, 2 * low, bias=qkv_bias)
        self.low_proj = nn.Linear(low, low)
        # The high frequencies have the same number of keys at every size of the map
        self.softmax = SoftmaxOptions(self.low_heads, dim // num_heads, place, pooling=window)

    def forward(self, x: Tensor) -> Tensor:
        padded = pad_to_multiple(x, (self.window, self.window))
        low = self.low(x, padded)
        if not self.high_heads:
            return low
        return torch.cat((self.high(padded)[:, : x.shape[1], : x.shape[2]], low), dim=-1)

    def high(self, x: Tensor) -> Tensor:
        qkv = self.high_qkv(x).unflatten(-1, (3, -1))
        return self.high_proj(window_attention(qkv, None, self.high_heads, (self.window, self.window)))

    def low(self, x: Tensor, padded: Tensor) -> Tensor:
        means = window_means(padded, (self.window, self.window))
        k, v = self.low_kv(means.unflatten(1, (-1, padded.shape[2] // self.window))).chunk(2, dim=-1)
        return self.low_proj(map_attention(self.low_q(x), k, v, self.low_heads, softmax=self.softmax))
