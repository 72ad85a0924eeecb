"""Neighbourhood attention of NAT and DiNAT (Hassani et al., CVPR 2023, arXiv:2204.07143; 2022, arXiv:2209.15001).

Written after the papers and the authors' repository, SHI-Labs/Neighborhood-Attention-Transformer (MIT).
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from ops.neighborhood import neighborhood_attention
from ops.registry import FIRST, Place, register_op


@register_op("neighborhood")
class NeighborhoodAttention(nn.Module):
    """Each token attends to the kernel x kernel tokens around it, or the nearest ones where the map ends.

    A side of the map that is shorter than kernel * dilation is zero-padded to that length, on the right or at the
    bottom; padded tokens are attended to. Cost is linear in H * W. Each argument of `kernel`, `dilation`, `stride` and
    `causal` is one value for both sides, or a value along H and a value along W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The block sets the default of `dilation`.
        kernel: Size of the neighbourhood in tokens; default 7.
        dilation: Distance between adjacent tokens of a neighbourhood. By default 1 in every first block of two, and in
            every second block the largest for which the map need not be padded, which are DiNAT's dilations on images
            of 224 or 384 pixels.
        stride: Number of consecutive tokens that share the neighbourhood of the middle one, from 1 (default) to
            `kernel`; a stride of `kernel` gives windows.
        causal: Attend to no token further down or further to the right; default False.
        bias: Learn a bias for each relative position, as NAT and DiNAT do; default True.
    """

    family = "local"
    renames = ((r"^rpb$", "relative_position_bias_table"),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        kernel: int | tuple[int, int] = 7,
        dilation: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] = 1,
        causal: bool | tuple[bool, bool] = False,
        bias: bool = True,
    ):
        super().__init__()
        if dilation is None and place.block % 2 == 0:
            dilation = 1
        # Any, because the annotation of to_2tuple does not say that it returns a pair
        pair: Any = to_2tuple
        self.kernel, self.stride, self.causal = pair(kernel), pair(stride), pair(causal)
        self.dilation = None if dilation is None else pair(dilation)
        if not all(1 <= s <= k for s, k in zip(self.stride, self.kernel, strict=True)):
            raise ValueError(f"kernel must be at least 1 and stride from 1 to kernel, not {kernel} and {stride}")
        if self.dilation is not None and min(self.dilation) < 1:
            raise ValueError(f"dilation must be at least 1, not {dilation}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = None
        if bias:
            sides = (2 * k - 1 for k in self.kernel)
            self.relative_position_bias_table = nn.Parameter(torch.empty(num_heads, *sides))
            trunc_normal_(self.relative_position_bias_table, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {"relative_position_bias_table"}

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        dilation = self.dilation
        if dilation is None:
            dilation = (max(H // self.kernel[0], 1), max(W // self.kernel[1], 1))
        pad_h, pad_w = (max(k * d - n, 0) for k, d, n in zip(self.kernel, dilation, (H, W), strict=True))
        qkv = self.qkv(F.pad(x, (0, 0, 0, pad_w, 0, pad_h)))
        bias = self.relative_position_bias_table
        out = neighborhood_attention(qkv, bias, self.num_heads, self.kernel, dilation, self.stride, self.causal)
        return self.proj(out[:, :H, :W])

    def resize_table(self, name: str, table: Tensor) -> Tensor:
        """Interpolate the bias table of another size of the neighbourhood, for `load_weights`, as the authors do."""
        size = self.get_parameter(name).shape[1:]
        return F.interpolate(table.unsqueeze(0), size, mode="bicubic").squeeze(0)
