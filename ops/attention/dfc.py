"""Decoupled fully connected (DFC) attention of GhostNetV2 (Tang et al., NeurIPS 2022, arXiv:2211.12905).

The authors' repository is huawei-noah/Efficient-AI-Backbones; the gate computes the same as timm's module
(Apache-2.0).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ops.registry import FIRST, Place, register_op


@register_op("dfc")
class DFCAttention(nn.Module):
    """Values are multiplied by a gate that convolves the map at half resolution along its rows, then its columns.

    GhostNetV2's gate multiplies the features of a Ghost module. This op multiplies a linear projection of the tokens
    instead, and projects the result, as attention does. The gate's convolutions have biases instead of batch norms,
    because batch norms would mix images; in evaluation, batch norms fold into the biases and weights. If a side of the
    map is odd, the last row or column at half resolution is computed from the last row or column of the map alone. Cost
    is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Without effect.
        kernel: Length of the convolutions in tokens at half resolution, odd; default 5.
    """

    family = "convolution"

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, kernel: int = 5):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, not {kernel}")
        self.value = nn.Linear(dim, dim)
        self.gate = nn.Sequential(
            nn.Conv2d(dim, dim, 1),
            nn.Conv2d(dim, dim, (1, kernel), padding=(0, kernel // 2), groups=dim),
            nn.Conv2d(dim, dim, (kernel, 1), padding=(kernel // 2, 0), groups=dim),
            nn.Sigmoid(),
        )
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        halved = F.avg_pool2d(x.permute(0, 3, 1, 2), 2, ceil_mode=True)
        gate = F.interpolate(self.gate(halved), scale_factor=2.0)[..., : x.shape[1], : x.shape[2]]
        return self.proj(self.value(x) * gate.permute(0, 2, 3, 1))
