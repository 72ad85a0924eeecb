"""Convolution-enhanced window attention of CoSwin (Khadka et al., arXiv:2509.08959).

By the paper's abstract and a summary; the authors' repository, puskal-khadka/coswin, could not be read. The form of the
convolution and the place where its result is added are our choice.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ops.attention.window import WindowAttention
from ops.registry import FIRST, Place, register_op


@register_op("conv_enhanced_window")
class ConvEnhancedWindowAttention(WindowAttention):
    """Shifted-window attention plus a 3 x 3 convolution of the whole map with GELU.

    The convolution sees the map before windows are cut or padded, so it crosses their borders. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The block sets the default of `shift`.
        window: Side of a window in tokens; default 7.
        shift: Number of tokens by which the windows are shifted, as in `WindowAttention`.
        qkv_bias: Give the query, key and value projections a bias; default True.
        depthwise: Convolve each channel on its own; default False.
        batch_norm: Apply a batch norm before GELU, as CoSwin does. Batch norms mix images in training, so the
            convolution has a bias by default.
    """

    family = "local"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int = 7,
        shift: int | None = None,
        qkv_bias: bool = True,
        depthwise: bool = False,
        batch_norm: bool = False,
    ):
        super().__init__(dim, num_heads, place=place, window=window, shift=shift, qkv_bias=qkv_bias)
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim if depthwise else 1, bias=not batch_norm)
        self.local_norm = nn.BatchNorm2d(dim) if batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        local = F.gelu(self.local_norm(self.local(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
        return super().forward(x) + local
