"""Ultra-lightweight subspace attention, ULSAM (Saini et al., WACV 2020, arXiv:2006.15102).

Written after the paper and what the authors' repository, Nandan91/ULSAM (no licence file), computes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ops.gate_registry import register_gate


@register_gate("ulsam")
class SubspaceAttention(nn.Module):
    """Each group of channels receives itself times a softmax over all places, a map that all of its channels share.

    The scores of a group are one convolution of one pixel of the group's features, after a factor and a bias for each
    channel and a maximum over 3 x 3 places. The softmax sums to 1, so a fresh gate changes a large map little. The
    authors' MobileNets have the gate after separable convolutions.

    Args:
        dim: Number of channels.
        groups: Number of groups of channels, a divisor of `dim`; default 4.
    """

    at = "block"

    def __init__(self, dim: int, groups: int = 4):
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"groups must divide {dim} channels, which {groups} does not")
        self.groups = groups
        self.scale = nn.Conv2d(dim, dim, 1, groups=dim)
        self.scale_norm = nn.BatchNorm2d(dim, momentum=0.9)
        self.score = nn.Conv2d(dim, groups, 1, groups=groups)
        self.score_norm = nn.BatchNorm2d(groups, momentum=0.9)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(self.scale_norm(self.scale(x)).relu(), 3, stride=1, padding=1)
        weights = self.score_norm(self.score(pooled)).relu().flatten(2).softmax(-1).unflatten(2, x.shape[2:])
        return x + x * weights.repeat_interleave(x.shape[1] // self.groups, 1)
