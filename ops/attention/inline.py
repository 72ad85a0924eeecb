"""InLine attention: injective linear attention (Han et al., NeurIPS 2024, arXiv:2412.06590)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op


@register_op("inline")
class InLineAttention(nn.Module):
    """Linear attention whose weights are normalised by subtraction, so that different queries have different weights.

    Token i attends to token j of N with weight scale / N * (q_i·k_j - q_i·mean of k) + 1 / N, which may be negative; a
    row of weights has the sum 1. A depthwise 3 x 3 convolution of the values is added to the map; its kernels are made
    for each image from the mean of its tokens, in each head apart. Cost is linear in H * W.

    Args:
        dim, num_heads: channels and heads.
        qkv_bias: give the query, key and value projections a bias.
        lepe_kernel: side of a depthwise convolution of the values, of the same kernels for all images, that is added
            as well, as in the paper's CSWin layout; 0 leaves it out.
    """

    takes_extra = True
    renames = ((r"^attns\.0\.get_v\.", "lepe."), (r"^attns\.0\.", ""))  # in CSWin's layout

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
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, extra: Tensor | None = None, *, mean: Tensor | None = None) -> Any:
        """`mean` (B, C) is what the kernels are made from, if not the mean of the tokens."""
        size, E = x.shape[1:3], 0 if extra is None else extra.shape[1]
        tokens = x.flatten(1, 2) if extra is None else torch.cat([extra, x.flatten(1, 2)], dim=1)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        values = v[:, E:].unflatten(1, size).permute(0, 3, 1, 2)
        local = self.convolve(values, tokens.mean(1) if mean is None else mean)

        q, k, v = (split_heads(t, self.num_heads) for t in (q, k, v))
        root = (self.scale / tokens.shape[1]) ** 0.5  # on both factors, for the range of half precision
        # The weights' two means are those of centred keys and of plain values
        kv = ((k - k.mean(-2, keepdim=True)) * root).transpose(-2, -1) @ (v * root)  # (B, heads, D, D)
        out = merge_heads(q @ kv + v.mean(-2, keepdim=True))
        out = self.proj(out + F.pad(local.flatten(2).transpose(1, 2), (0, 0, E, 0)))
        x = out[:, E:].unflatten(1, size)
        return x if extra is None else (x, out[:, :E])

    def convolve(self, values: Tensor, mean: Tensor) -> Tensor:
        """Each image's values (B, C, H, W) convolved with the kernels made from its mean (B, C)."""
        B, C, H, W = values.shape
        kernels = self.residual(mean.unsqueeze(-1)).reshape(B * C, 1, 3, 3)
        out = F.conv2d(values.reshape(1, B * C, H, W), kernels, padding=1, groups=B * C).view(B, C, H, W)
        return out if self.lepe is None else out + self.lepe(values)
