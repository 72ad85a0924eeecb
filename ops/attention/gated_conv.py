"""Gated convolution, the token mixer of MambaOut (Yu and Wang, CVPR 2025, arXiv:2405.07992)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.registry import FIRST, Place, register_op


@register_op("gated_conv")
class GatedConv(nn.Module):
    """A wider projection of the tokens, part of it convolved depthwise, times a gate. Cost is linear in H * W.

    It is MambaOut's block without norm and residual, and mixes channels as an MLP does; there it stands for both.

    Args:
        dim: channels. `num_heads` has no effect.
        kernel: side of the convolution.
        expansion: channels of the gate, and of what it multiplies, as a multiple of `dim`.
        conv_ratio: channels that are convolved, as a multiple of `dim`.
    """

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
        gate, plain, convolved = self.fc1(x).split(self.widths, dim=-1)
        convolved = self.conv(convolved.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(gate) * torch.cat((plain, convolved), dim=-1))
