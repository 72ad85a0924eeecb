"""Decoupled fully connected attention of GhostNetV2 (Tang et al., NeurIPS 2022, arXiv:2211.12905)."""

import torch.nn.functional as F
from torch import Tensor, nn

from ops.registry import FIRST, Place, register_op


@register_op("dfc")
class DFCAttention(nn.Module):
    """Values times a gate that gathers along rows, then along columns, of the map at half resolution.

    GhostNetV2's gate multiplies the features of a Ghost module. As a token mixer it multiplies a linear projection of
    the tokens, and another follows, as in attention. Its convolutions have biases in place of batch norms, which would
    mix images; in evaluation, batch norms fold into them. Odd maps have a last row or column of their own at half
    resolution. Cost is linear in H * W.

    Args:
        dim: channels. `num_heads` has no effect.
        kernel: tokens at half resolution that are gathered along each axis.
    """

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
