"""Single-head attention on part of the channels, of SHViT (Yun and Ro, CVPR 2024, arXiv:2401.16456).

Written after the paper and timm (Apache-2.0), which follows the authors' repository, ysj9909/SHViT (MIT).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import map_attention
from ops.registry import FIRST, Place, register_op
from ops.softmax import SoftmaxOptions
from ops.weighting import WeightedSums


@register_op("single_head")
class SingleHeadAttention(nn.Module):
    """All tokens attend to all tokens with their first channels, in one head; the other channels stay as they are.

    The attending channels are normalised together, as one group, and a projection of all channels follows. Projections
    have biases instead of SHViT's batch norms, because batch norms would mix images; in evaluation, batch norms fold
    into the biases and weights. Cost is quadratic in H * W, for `key_dim` + `partial_ratio` * dim channels.

    Args:
        dim: Number of channels.
        num_heads: Without effect.
        partial_ratio: Number of attending channels as a multiple of `dim`; default 3 / 14.
        key_dim: Number of channels of queries and keys; default 16.
    """

    family = "full"
    softmax_options = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        partial_ratio: float = 3 / 14,
        key_dim: int = 16,
    ):
        super().__init__()
        partial = int(partial_ratio * dim)
        if key_dim < 1:
            raise ValueError(f"key_dim must be at least 1, not {key_dim}")
        if not 0 < partial <= dim:
            raise ValueError(f"partial_ratio must take from 1 to all of {dim} channels, which {partial_ratio} does not")
        self.partial, self.widths = (partial, dim - partial), (key_dim, key_dim, partial)
        self.softmax = SoftmaxOptions(1, key_dim, place)
        self.pre_norm = nn.GroupNorm(1, partial)
        self.qkv = nn.Linear(partial, sum(self.widths))
        self.sums = WeightedSums()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x, other_channels = x.split(self.partial, dim=-1)
        x = self.pre_norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = self.sums(map_attention(*self.qkv(x).split(self.widths, dim=-1), num_heads=1, softmax=self.softmax))
        return self.proj(F.relu(torch.cat((out, other_channels), dim=-1)))
