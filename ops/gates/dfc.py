"""Decoupled fully connected (DFC) attention of GhostNetV2 (Tang et al., NeurIPS 2022, arXiv:2211.12905).

The authors' repository is huawei-noah/Efficient-AI-Backbones; the gate computes the same as that of timm's GhostNetV2
(Apache-2.0).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ops.gate_registry import register_gate


@register_gate("dfc")
class DecoupledFullyConnected(nn.Module):
    """Values are weighted by a sigmoid of the map at half resolution, convolved along its rows, then its columns.

    If a side of the map is odd, the last row or column at half resolution is computed from the last row or column of
    the map alone.

    Args:
        dim: Number of channels.
        kernel: Length of the convolutions in places at half resolution, odd; default 5.
    """

    def __init__(self, dim: int, kernel: int = 5):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, not {kernel}")
        layers = [
            nn.Conv2d(dim, dim, 1, bias=False),
            nn.Conv2d(dim, dim, (1, kernel), padding=(0, kernel // 2), groups=dim, bias=False),
            nn.Conv2d(dim, dim, (kernel, 1), padding=(kernel // 2, 0), groups=dim, bias=False),
        ]
        self.factors = nn.Sequential(*(layer for conv in layers for layer in (conv, nn.BatchNorm2d(dim))))

    def forward(self, x: Tensor) -> Tensor:
        factors = self.factors(F.avg_pool2d(x, 2, ceil_mode=True)).sigmoid()
        return x * F.interpolate(factors, scale_factor=2.0)[..., : x.shape[2], : x.shape[3]]
