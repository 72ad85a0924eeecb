"""Grouped differential attention (Lim et al., 2025, arXiv:2510.06949).

Paper: Grouped Differential Attention. Written after a description of the layout of Motif-2-12.7B, whose code could not
be read. Differential attention is by Ye et al., ICLR 2025, arXiv:2410.05258.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.norm import RMSNorm
from ops.registry import FIRST, Place, register_op
from ops.weighting import WeightedSums
from ops.windowed import WindowedOp

NOISE_FACTORS = ("layer", "token")


@register_op("grouped_differential")
class GroupedDifferentialAttention(WindowedOp):
    """The attention of each signal head, less a multiple of the attention of the noise head that its group shares.

    A group has `ratio` signal heads and one noise head, one head of keys for each kind, and one head of values for
    both, twice as wide as queries and keys. Queries and keys have half of the width of ordinary heads. Windows and
    padding are those of `WindowedOp`; cost is linear in H * W with windows, else quadratic.

    Args:
        dim: Number of channels.
        num_heads: Number of signal heads; must divide `dim` / 2.
        place: The block sets the default of `layer`, the stride that of `window`.
        ratio: Number of signal heads of a group, a divisor of `num_heads`; by default the largest up to 4. With 1 the
            op is differential attention.
        window: Side of the windows, as in `WindowedOp`.
        factor: Factor of the noise head. "layer" (default): learned for the layer, and each head's output is normed and
            scaled by 1 less the factor's initial value. "token": a sigmoid of a linear function of the token for each
            group, without the norm, as reported of Motif-3; not verified.
        layer: Number of the layer from 1, from which the initial factor 0.8 - 0.6 * exp(-0.3 * (layer - 1)) follows; by
            default counted from the beginning of the stage.
        qkv_bias: Give the query, key and value projections a bias; default False.
    """

    family = "local"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        ratio: int | None = None,
        window: int | None = None,
        factor: str = "layer",
        layer: int | None = None,
        qkv_bias: bool = False,
    ):
        super().__init__(place, window)
        ratio = next(n for n in range(min(num_heads, 4), 0, -1) if num_heads % n == 0) if ratio is None else ratio
        layer = place.block + 1 if layer is None else layer
        if ratio < 1 or num_heads % ratio:
            raise ValueError(f"ratio must be positive and a divisor of {num_heads}, the number of heads, not {ratio}")
        if dim % (2 * num_heads):
            raise ValueError(f"twice the number of heads, {2 * num_heads}, must divide {dim} channels")
        if factor not in NOISE_FACTORS:
            raise ValueError(f"factor must be 'layer' or 'token', not {factor!r}")
        if layer < 1:
            raise ValueError(f"layer must be at least 1, not {layer}")
        self.num_heads, self.ratio, self.groups, head_dim = num_heads, ratio, num_heads // ratio, dim // (2 * num_heads)
        self.initial_factor = 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))
        self.q = nn.Linear(dim, (ratio + 1) * self.groups * head_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, 2 * self.groups * head_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, 2 * self.groups * head_dim, bias=qkv_bias)
        self.sums = WeightedSums()
        self.proj = nn.Linear(dim, dim)
        self.lambdas = self.norm = self.token_factor = None
        if factor == "layer":
            # Two pairs of vectors of queries and keys
            self.lambdas = nn.Parameter(0.1 * torch.randn(2, 2, head_dim))
            self.norm = RMSNorm(2 * head_dim, 1e-5)
        else:
            self.token_factor = nn.Linear(dim, self.groups)

    def no_weight_decay(self) -> set[str]:
        return set() if self.lambdas is None else {"lambdas"}

    def mix(self, x: Tensor) -> Tensor:
        # The last query of a group is that of its noise head
        q = self.q(x).unflatten(-1, (self.groups * (self.ratio + 1), -1)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (self.groups, 2, -1)).permute(0, 2, 3, 1, 4)  # (B, groups, 2, N, D)
        v = self.v(x).unflatten(-1, (self.groups, -1)).transpose(1, 2)  # (B, groups, N, 2D)
        kinds = torch.arange(self.ratio + 1, device=x.device) // self.ratio
        k, v = k[:, :, kinds].flatten(1, 2), v.repeat_interleave(self.ratio + 1, dim=1)
        heads = F.scaled_dot_product_attention(q, k, v).unflatten(1, (self.groups, -1))
        signal, noise = heads.split((self.ratio, 1), dim=2)  # (B, groups, ratio or 1, N, 2D)
        out = signal - self.factor(x).to(noise.dtype) * noise
        out = self.sums(out.flatten(1, 2).transpose(1, 2).flatten(2))
        if self.norm is not None:
            out = (self.norm(out.unflatten(2, (self.num_heads, -1))) * (1 - self.initial_factor)).flatten(2)
        return self.proj(out)

    def factor(self, x: Tensor) -> Tensor:
        """Return the factor of the noise heads for tokens (B, N, C): a scalar, or (B, groups, 1, N, 1)."""
        if self.token_factor is not None:
            return self.token_factor(x).sigmoid().transpose(1, 2)[:, :, None, :, None]
        assert self.lambdas is not None
        first, second = self.lambdas.prod(1).sum(-1).exp()
        return first - second + self.initial_factor
