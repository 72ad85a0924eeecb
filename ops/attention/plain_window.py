"""Window attention of DaViT, without positions (Ding et al., ECCV 2022, arXiv:2204.03645).

The authors' repository is dingmyu/davit (MIT).
"""

from torch import Tensor, nn

from ops.functional import window_attention
from ops.registry import FIRST, Place, register_op
from ops.softmax import SoftmaxOptions
from ops.windows import pad_to_multiple


@register_op("plain_window")
class PlainWindowAttention(nn.Module):
    """Tokens attend to the tokens of their window, without shifts and without positions.

    The map is zero-padded on the right and at the bottom to a multiple of the window; padded tokens are attended to.
    Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        window: Side of a window in tokens; default 7.
        qkv_bias: Give the query, key and value projections a bias; default True.
    """

    family = "local"
    softmax_options = True

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, window: int = 7, qkv_bias: bool = True):
        super().__init__()
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        self.num_heads, self.window = num_heads, window
        self.softmax = SoftmaxOptions(num_heads, dim // num_heads, place, window, content=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        window = (self.window, self.window)
        qkv = self.qkv(pad_to_multiple(x, window)).unflatten(-1, (3, -1))
        bias, scale = self.softmax.window_options(None, window)
        out = window_attention(qkv, bias, self.num_heads, window, scale=scale)
        return self.proj(out[:, : x.shape[1], : x.shape[2]])
