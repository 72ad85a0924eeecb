"""MSA-Conv, the attention inside a convolution's window of TiC (Zhang et al., arXiv:2310.04134).

Written after the paper and the authors' repository, zs670980918/MSA-Conv (no licence of its own), which holds this
operator only.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ops.registry import FIRST, Place, register_op
from ops.weighting import WeightedSums


@register_op("msa_conv")
class MSAConv(nn.Module):
    """Tokens attend to a window around themselves; a convolution and ReLU follow the sum of this and the input.

    Outside the map, keys and values are zeros, which take part in softmax with a score of 0. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Without effect; there is one head.
        kernel: Side of the window and of the convolution in tokens, odd; default 3.
        dilation: Distance between the tokens of a window; default 1. The convolution has none.
        dropout: Dropout rate of the attention's weights; default 0.
        out_dim: Number of channels of the output; by default `dim`.
        conv_stride: Stride of the convolution; default 1. Another stride changes the map's size.
        conv_padding: Padding of the convolution; by default kernel // 2, which keeps the map's size. The default of the
            authors' code is 1.
        bias: Give the convolution a bias; default False.
    """

    family = "local"
    renames = ((r"^qkv_conv\.", "qkv."), (r"^mlp\.", "conv."))

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        kernel: int = 3,
        dilation: int = 1,
        dropout: float = 0.0,
        out_dim: int | None = None,
        conv_stride: int = 1,
        conv_padding: int | None = None,
        bias: bool = False,
    ):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, not {kernel}")
        padding = kernel // 2 if conv_padding is None else conv_padding
        if min(dilation, conv_stride) < 1 or padding < 0:
            given = f"{dilation}, {conv_stride} and {padding}"
            raise ValueError(f"dilation and conv_stride must be at least 1, and conv_padding at least 0, not {given}")
        self.kernel, self.dilation = kernel, dilation
        self.qkv = nn.Linear(dim, 3 * dim)
        self.drop = nn.Dropout(dropout)
        self.sums = WeightedSums()
        self.conv = nn.Conv2d(dim, dim if out_dim is None else out_dim, kernel, conv_stride, padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).permute(0, 3, 1, 2).chunk(3, dim=1)
        scores = (q.flatten(2)[:, :, None] * self.windows(k)).sum(1) * x.shape[3] ** -0.5  # (B, kernel², H * W)
        weights = self.drop(scores.softmax(1))
        mixed = (weights[:, None] * self.windows(v)).sum(2).unflatten(2, x.shape[1:3])
        mixed = self.sums(mixed.permute(0, 2, 3, 1))
        return F.relu(self.conv((mixed + x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)

    def windows(self, x: Tensor) -> Tensor:
        """Return the windows around all tokens of (B, C, H, W): (B, C, kernel², H * W)."""
        padding = self.dilation * (self.kernel // 2)
        return F.unfold(x, self.kernel, self.dilation, padding).unflatten(1, (x.shape[1], -1))
