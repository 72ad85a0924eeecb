"""Channel processing of FAN (Zhou et al., ICML 2022, arXiv:2204.12451), in place of an MLP."""

from collections.abc import Sequence

import torch
from timm.models.xcit import LPI
from torch import Tensor, nn

from models.layers.pvt_v2 import init_conv
from ops.functional import split_heads


class ConvMlp(nn.Module):
    """Linear MLP on tokens of a map, with depthwise convolutions added to its hidden map."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = LPI(hidden)
        self.gamma = nn.Parameter(torch.ones(hidden))
        self.fc2 = nn.Linear(hidden, dim)
        self.apply(init_conv)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        x = self.fc1(x)
        return self.fc2(self.gamma * self.dwconv(x, *size) + x)


class ChannelAttention(nn.Module):
    """FAN's channel processing: an MLP whose output channels are weighted by their agreement with a summary of the map.

    The weight of a channel is a sigmoid of the product, over all tokens, of the channel's query with the head's mean
    channel, both after a softmax over the tokens.
    """

    def __init__(self, dim: int, heads: int, hidden: int, eps: float):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.mlp_v = ConvMlp(dim, hidden)
        self.norm_v = nn.LayerNorm(dim, eps=eps)
        self.q = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        heads = len(self.temperature)
        q, k = split_heads(self.q(x), heads).softmax(-2), split_heads(x, heads).softmax(-2).mean(-1, keepdim=True)
        weights = (q.transpose(-2, -1) @ k).sigmoid() * self.temperature  # (B, heads, D, 1)
        return self.norm_v(self.mlp_v(x, size)) * weights.flatten(1).unsqueeze(1)
