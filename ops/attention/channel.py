"""Channel attention of DaViT (Ding et al., ECCV 2022, arXiv:2204.03645)."""

from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op


@register_op("channel")
class ChannelAttention(nn.Module):
    """Inside each group, channels attend to channels: a channel's token is its whole map.

    Tokens do not meet except through the scores, products of keys and values over the map. Cost is linear in H * W.

    Args:
        dim, num_heads: channels and groups of them.
        qkv_bias: give the query, key and value projections a bias.
    """

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, qkv_bias: bool = True):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).flatten(1, 2).chunk(3, dim=-1))
        weights = ((self.scale * k).transpose(-2, -1) @ v).softmax(-1)  # (B, groups, C / groups, C / groups)
        return self.proj(merge_heads(q @ weights.transpose(-2, -1)).unflatten(1, x.shape[1:3]))
