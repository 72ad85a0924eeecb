"""InLine attention: injective linear attention (Han et al., NeurIPS 2024, arXiv:2412.06590).

Written after the paper and the authors' repository, LeapLabTHU/InLine (no licence of its own).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.linear import linear_attention
from ops.registry import FIRST, Place, register_op
from ops.weighting import WeightedSums


@register_op("inline")
class InLineAttention(nn.Module):
    """All tokens attend to all tokens by linear attention with weights that are normalised by subtraction.

    Token i attends to token j of N with the weight scale / N * (q_i·k_j - q_i·mean of k) + 1 / N, which may be
    negative. The weights of a token sum to 1, and different queries have different weights. A depthwise 3 x 3
    convolution of the values is added to the output of the map's tokens; its kernels are computed for each image and
    head from the mean of the tokens. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        qkv_bias: Give the query, key and value projections a bias; default True.
        lepe_kernel: Side of a depthwise convolution of the values, with the same kernels for all images, that is added
            as well, as in the paper's CSWin layout; odd, or 0 (default) for none.
    """

    family = "linear"
    takes_extra = True
    # From the authors' nets in CSWin's layout
    renames = ((r"^attns\.0\.get_v\.", "lepe."), (r"^attns\.0\.", ""))

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        qkv_bias: bool = True,
        lepe_kernel: int = 0,
    ):
        super().__init__()
        if lepe_kernel and (lepe_kernel < 0 or lepe_kernel % 2 == 0):
            raise ValueError(f"lepe_kernel must be odd, or 0, not {lepe_kernel}")
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=num_heads), nn.GELU(), nn.Conv1d(dim, 9 * dim, 1, groups=num_heads)
        )
        self.lepe = nn.Conv2d(dim, dim, lepe_kernel, padding=lepe_kernel // 2, groups=dim) if lepe_kernel else None
        self.sums = WeightedSums()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, extra: Tensor | None = None, *, mean: Tensor | None = None) -> Any:
        """Mix the tokens of a map (B, H, W, C) and extra tokens (B, E, C).

        Args:
            x: Map (B, H, W, C).
            extra: Extra tokens (B, E, C), or None.
            mean: Tensor (B, C) from which the kernels are computed; by default the mean of all tokens.

        Returns:
            The map, or the map and the extra tokens if `extra` is given.
        """
        size, E = x.shape[1:3], 0 if extra is None else extra.shape[1]
        tokens = x.flatten(1, 2) if extra is None else torch.cat([extra, x.flatten(1, 2)], dim=1)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        values = v[:, E:].unflatten(1, size).permute(0, 3, 1, 2)
        local = self.convolve(values, tokens.mean(1) if mean is None else mean)

        out = self.sums(linear_attention((q, k, v), self.num_heads, "identity", "subtract", self.scale))
        out = self.proj(out + F.pad(local.flatten(2).transpose(1, 2), (0, 0, E, 0)))
        x = out[:, E:].unflatten(1, size)
        return x if extra is None else (x, out[:, :E])

    def convolve(self, values: Tensor, mean: Tensor) -> Tensor:
        """Convolve the values (B, C, H, W) of each image with kernels that are computed from its `mean` (B, C)."""
        B, C, H, W = values.shape
        kernels = self.residual(mean.unsqueeze(-1)).reshape(B * C, 1, 3, 3)
        out = F.conv2d(values.reshape(1, B * C, H, W), kernels, padding=1, groups=B * C).view(B, C, H, W)
        return out if self.lepe is None else out + self.lepe(values)
