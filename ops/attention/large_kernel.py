"""Large-kernel gate, the token mixer of CFSR's ConvFormer layer (Wu et al., IEEE TIP 2024, arXiv:2401.05633).

Paper: CFSR: Transforming Image Super-Resolution, A ConvFormer-based Efficient Approach. Written after the paper and the
authors' repository, Aitical/CFSR (no licence). Conv2Former has the same gate with a kernel of 11.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ops.registry import FIRST, Place, register_op


@register_op("large_kernel")
class LargeKernelGate(nn.Module):
    """Values are multiplied by a gate: a projection of each token, GELU, and a large depthwise convolution.

    The convolution zero-pads the map, so that any size keeps its size. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Without effect.
        kernel: Side of the convolution, odd; default 9.
    """

    family = "convolution"
    renames = ((r"^a\.0\.", "gate."), (r"^a\.2\.lkb_reparam\.", "conv."), (r"^v\.", "value."))

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, kernel: int = 9):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, not {kernel}")
        self.gate = nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(F.gelu(self.gate(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(gate * self.value(x))
