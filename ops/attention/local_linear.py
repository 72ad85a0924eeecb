"""Local linear attention (Zuo et al., 2025, arXiv:2510.01450).

Paper: Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention for Test-Time Regression.
Written after its definition; the authors' repository, Yifei-Zuo/Flash-LLA, holds no code yet. Ours are the windows and
the scale of the regulariser.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.precision import at_least_float32, without_autocast
from ops.registry import FIRST, Place, register_op
from ops.windowed import WindowedOp

# Smallest ratio of the penalty, below which single precision does not suffice
MIN_RIDGE = 1e-3


@register_op("local_linear")
class LocalLinearAttention(WindowedOp):
    """The output is a linear regression of the values on the keys around each query, read at the query.

    Softmax attention is the local mean of the values, with its weights w_j. This op fits v_j ≈ b + A (k_j - q) by least
    squares with these weights and a penalty λ |A|², and returns b. A strong penalty gives softmax attention. Windows
    and padding are those of `WindowedOp`. Cost is H * W * window² * D² for D channels of a head, in at least float32.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        window: Side of the windows, as in `WindowedOp`; default 7.
        ridge: Initial λ relative to the mean square of the keys' offsets from the query, weighted with w, over the
            channels of a head. The ratio is learned for each head and stays above 0.001. Default 0.1.
        qkv_bias: Give the query, key and value projections a bias; default True.
    """

    family = "local"
    takes_extra = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int = 7,
        ridge: float = 0.1,
        qkv_bias: bool = True,
    ):
        super().__init__(place, window)
        if ridge <= MIN_RIDGE:
            raise ValueError(f"ridge must be above {MIN_RIDGE}, not {ridge}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        # Softplus gives the ratio less its minimum
        self.ridge = nn.Parameter(torch.full((num_heads, 1), ridge - MIN_RIDGE).expm1().log())

    def no_weight_decay(self) -> set[str]:
        return {"ridge"}

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, dim=-1))
        with without_autocast(x):
            wide_q, wide_k, wide_v, ridge = at_least_float32(q, k, v, self.ridge)
            out = local_linear(wide_q, wide_k, wide_v, MIN_RIDGE + F.softplus(ridge))
        return self.proj(merge_heads(out.to(v.dtype)))


def local_linear(q: Tensor, k: Tensor, v: Tensor, ridge: Tensor | float) -> Tensor:
    """Compute local linear attention; `ridge` is relative to the mean square of the keys' offsets from the query.

    With the weights' mean m and covariance S of the keys, the regression's weights are w_j (1 - (k_j - m) · a), where
    (S + λ) a = m - q: the closed form of the weighted least squares, with its denominator divided out. They sum to 1
    and can be negative.

    Args:
        q: Queries (..., N, D).
        k: Keys (..., M, D).
        v: Values (..., M, E).
        ridge: Ratio, broadcasts to (..., N).

    Returns:
        Tensor (..., N, E).
    """
    D = k.shape[-1]
    weights = (q @ k.transpose(-2, -1) * D**-0.5).softmax(-1)
    # Moments about the mean of all keys, where their rounding errors are small
    centre = k.mean(-2, keepdim=True)
    k, q = k - centre, q - centre
    mean = weights @ k  # (..., N, D)
    squares = (weights @ (k.unsqueeze(-1) * k.unsqueeze(-2)).flatten(-2)).unflatten(-1, (D, D))
    covariance = squares - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    offset = mean - q
    spread = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + offset.square().sum(-1)
    # The second term keeps the matrix regular where all keys equal the query
    penalty = ridge * spread / D + torch.finfo(k.dtype).tiny ** 0.5
    matrix = covariance + penalty[..., None, None] * torch.eye(D, dtype=k.dtype, device=k.device)
    slope = torch.linalg.solve_ex(matrix, offset.unsqueeze(-1))[0].squeeze(-1)
    factors = 1 + (mean * slope).sum(-1, keepdim=True) - slope @ k.transpose(-2, -1)
    return (weights * factors) @ v
