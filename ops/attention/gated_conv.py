"""Gated convolution, the token mixer of MambaOut (Yu and Wang, CVPR 2025, arXiv:2405.07992).

The authors' repository is yuweihao/MambaOut; the op computes the same as timm's module (Apache-2.0).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.registry import FIRST, Place, register_op


@register_op("gated_conv")
class GatedConv(nn.Module):
    """Tokens are projected to more channels, some of them are convolved depthwise, and a gate multiplies them all.

    The op is MambaOut's block without norm and residual. It mixes channels as well, as an MLP does; MambaOut has no
    other MLP. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Without effect.
        kernel: Side of the convolution, odd; default 7.
        expansion: Number of gated channels as a multiple of `dim`; default 8 / 3.
        conv_ratio: Number of convolved channels as a multiple of `dim`, at most `expansion`; default 1.
    """

    family = "convolution"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        kernel: int = 7,
        expansion: float = 8 / 3,
        conv_ratio: float = 1.0,
    ):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, not {kernel}")
        hidden, convolved = int(expansion * dim), int(conv_ratio * dim)
        if not 0 < convolved <= hidden:
            raise ValueError(f"conv_ratio must be positive and at most expansion, not {conv_ratio} and {expansion}")
        self.widths = (hidden, hidden - convolved, convolved)
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.conv = nn.Conv2d(convolved, convolved, kernel, padding=kernel // 2, groups=convolved)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, identity, convolved = self.fc1(x).split(self.widths, dim=-1)
        convolved = self.conv(convolved.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(gate) * torch.cat((identity, convolved), dim=-1))
