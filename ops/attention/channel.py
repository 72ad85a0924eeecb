"""Channel group attention of DaViT (Ding et al., ECCV 2022, arXiv:2204.03645).

The authors' repository is dingmyu/davit (MIT); the op computes the same as timm's module (Apache-2.0).
"""

from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op


@register_op("channel")
class ChannelAttention(nn.Module):
    """Channels attend to the channels of their group; a channel's feature vector is its whole map.

    Tokens influence each other only through the scores, which are products of keys and values summed over the map. Cost
    is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of groups of channels.
        qkv_bias: Give the query, key and value projections a bias; default True.
    """

    family = "channel"

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, qkv_bias: bool = True):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).flatten(1, 2).chunk(3, dim=-1))
        weights = ((self.scale * k).transpose(-2, -1) @ v).softmax(-1)  # (B, groups, C / groups, C / groups)
        return self.proj(merge_heads(q @ weights.transpose(-2, -1)).unflatten(1, x.shape[1:3]))
