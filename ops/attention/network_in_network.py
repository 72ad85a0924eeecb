"""Network-in-network gating of NiNformer (Abdullah and Sun, 2024, arXiv:2403.02411).

Written after the paper and the authors' repository, Abdullah-88/NiNformer (BSD-3-Clause).
"""

from typing import cast

import torch.nn.functional as F
from timm.layers import Mlp, to_2tuple
from torch import Tensor, nn

from ops.registry import FIRST, Place, register_op
from retinue.utils.arithmetic import ceil_div

# Largest default side of the grid for which weights are learned: they grow with the number of tokens.
LARGEST_GRID = 14


@register_op("network_in_network")
class NetworkInNetwork(nn.Module):
    """An MLP-Mixer block over all tokens gates a linear projection of each token.

    The Mixer block has an MLP over the tokens, whose weights are learned for a grid of tokens, and an MLP over the
    channels. On a map of another size the weights over the tokens are interpolated, and those that gather tokens are
    scaled by the ratio of the numbers of tokens. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Not used; the op has no heads.
        place: The stride sets the default of `size`.
        size: Size (H, W) of the grid for which weights are learned, or one number for both; by default the map's size
            at an image of 224 pixels, but at most 14.
        hidden: Hidden units of both MLPs; by default twice `dim`.
        dropout: Dropout rate after each layer of both MLPs; default 0.
    """

    family = "convolution"
    renames = (
        (r"^Mixer\.(token|channel)_mix\.0\.", r"\1_norm."),
        (r"^Mixer\.(token|channel)_mix\.\d\.net\.0\.", r"\1_mlp.fc1."),
        (r"^Mixer\.(token|channel)_mix\.\d\.net\.3\.", r"\1_mlp.fc2."),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        size: int | tuple[int, int] | None = None,
        hidden: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        hidden = 2 * dim if hidden is None else hidden
        H, W = map(int, to_2tuple(min(ceil_div(224, place.stride), LARGEST_GRID) if size is None else size))
        if min(H, W, hidden) < 1:
            raise ValueError(f"size and hidden must be at least 1, not {size} and {hidden}")
        self.grid = (H, W)
        self.token_norm = nn.LayerNorm(dim)
        self.token_mlp = Mlp(H * W, hidden, drop=dropout)
        self.channel_norm = nn.LayerNorm(dim)
        self.channel_mlp = Mlp(dim, hidden, drop=dropout)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate = x + self.mix_tokens(self.token_norm(x))
        gate = gate + self.channel_mlp(self.channel_norm(gate))
        return self.proj(x) * gate

    def mix_tokens(self, x: Tensor) -> Tensor:
        """Apply the MLP over tokens to each channel of (B, H, W, C)."""
        size, mlp = (x.shape[1], x.shape[2]), self.token_mlp
        fc1, fc2 = cast(nn.Linear, mlp.fc1), cast(nn.Linear, mlp.fc2)
        gather = self.resize(fc1.weight, size) * (self.grid[0] * self.grid[1] / (size[0] * size[1]))
        scatter, bias = self.resize(fc2.weight.T, size).T, self.resize(fc2.bias[None], size)[0]
        x = F.linear(x.flatten(1, 2).transpose(1, 2), gather, fc1.bias)  # (B, C, hidden)
        x = mlp.drop2(F.linear(mlp.drop1(mlp.act(x)), scatter, bias))
        return x.transpose(1, 2).unflatten(1, size)

    def resize(self, weight: Tensor, size: tuple[int, int]) -> Tensor:
        """Interpolate weights over the tokens of the grid, (n, h * w), to a map of `size` (H, W): (n, H * W)."""
        if size == self.grid:
            return weight
        return F.interpolate(weight.unflatten(1, self.grid)[None], size, mode="bilinear")[0].flatten(1)
