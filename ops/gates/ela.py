"""Efficient local attention, ELA (Xu and Wan, 2024, arXiv:2403.01123).

Written after the paper; no repository of the authors is known.
"""

import math

from torch import Tensor, nn

from ops.gate_registry import register_gate

# Form -> length of the 1-D convolution, channels in one of its groups (0: one channel), groups of the norm
FORMS = {"tiny": (5, 1, 32), "base": (7, 1, 16), "small": (5, 8, 16), "large": (7, 8, 16)}


@register_gate("ela")
class EfficientLocalAttention(nn.Module):
    """Each value is weighted by a factor of its channel and row and one of its channel and column.

    The factors are sigmoids of the means over the row or column, after a 1-D convolution along the column of row means
    or the row of column means, and a group norm. Both directions share the convolution and the norm. A number of
    channels that the paper's groups do not divide gets the largest groups that do.

    Args:
        dim: Number of channels.
        form: "tiny", "base", "small" or "large": ELA-T, ELA-B, ELA-S and ELA-L of the paper; default "base".
    """

    def __init__(self, dim: int, form: str = "base"):
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
        length, width, norm_groups = FORMS[form]
        groups = dim // math.gcd(dim, width)
        self.conv = nn.Conv1d(dim, dim, length, padding=length // 2, groups=groups, bias=False)
        self.norm = nn.GroupNorm(math.gcd(dim, norm_groups), dim)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self.norm(self.conv(x.mean(axis))).sigmoid() for axis in (3, 2))
        return x * rows.unsqueeze(3) * columns.unsqueeze(2)
