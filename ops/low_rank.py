"""Biases of low rank on attention scores, as factors that are appended to queries and keys (FlashBias).

A bias b_ij = φ_q(i) · φ_k(j) of rank R equals R more channels of the queries and keys, so attention without a bias
computes it and no N x N matrix is stored (Wu et al., NeurIPS 2025, arXiv:2505.12044). Written after the paper and the
authors' repository, thuml/FlashBias (MIT). Factors are a pair of tensors (heads, N, R) and (heads, M, R).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retinue.utils.arithmetic import padding

Factors = tuple[Tensor, Tensor]


def append_factors(q: Tensor, k: Tensor, factors: Factors, scale: float) -> Factors:
    """Return queries and keys for attention with the factors' bias and a scale of 1.

    Tokens that the factors lack are extra tokens in front, whose bias is 0. Zeros fill the channels up to a multiple
    of 8, which the fused kernels need.

    Args:
        q: Queries (B, heads, E + N, D).
        k: Keys (B, heads, E + M, D).
        factors: Factors (..., heads, N, R) and (..., heads, M, R).
        scale: Factor on the products of queries and keys before the bias is added.
    """
    widened = []
    for x, phi in zip((q * scale, k), factors, strict=True):
        fill = padding(x.shape[-1] + phi.shape[-1], 8)
        phi = F.pad(phi.to(x.dtype), (0, fill, x.shape[-2] - phi.shape[-2], 0))
        widened.append(torch.cat([x, phi.expand(*x.shape[:-1], -1)], dim=-1))
    return widened[0], widened[1]


def distance_factors(queries: Tensor, keys: Tensor, slopes: Tensor) -> Factors:
    """Return the factors, of rank D + 2, of minus the slope times the squared distance of two positions.

    Args:
        queries: Positions (N, D).
        keys: Positions (M, D).
        slopes: Slope of each head (heads,).
    """
    one = torch.ones_like
    phi_q = torch.cat([-queries.square().sum(-1, keepdim=True), -one(queries[:, :1]), 2 * queries], dim=-1)
    phi_k = torch.cat([one(keys[:, :1]), keys.square().sum(-1, keepdim=True), keys], dim=-1)
    return slopes.view(-1, 1, 1) * phi_q, phi_k.expand(len(slopes), -1, -1)


def alibi_factors(tokens: int, slopes: Tensor) -> Factors:
    """Return the factors, of rank 2, of minus the slope times i - j, which is ALiBi's bias under a causal mask.

    Args:
        tokens: Number of tokens N.
        slopes: Slope of each head (heads,).
    """
    place, slopes = torch.arange(tokens, device=slopes.device, dtype=slopes.dtype), slopes.view(-1, 1)
    phi_q = torch.stack([-slopes * place, slopes.expand(-1, tokens)], dim=-1)
    return phi_q, torch.stack([torch.ones_like(place), place], dim=-1).expand(len(slopes), -1, -1)


def svd_factors(bias: Tensor, rank: int | None = None, energy: float = 0.995) -> Factors:
    """Return the factors of the best approximation of a bias, such as that of a table of relative positions.

    Args:
        bias: Bias (heads, N, M).
        rank: Rank R; by default the smallest that keeps the share `energy` of each head's sum of squares.
        energy: Share of the sum of squares, at most 1.
    """
    left, values, right = torch.linalg.svd(bias, full_matrices=False)
    if rank is None:
        kept = values.square().cumsum(-1) / values.square().sum(-1, keepdim=True).clamp_min(1e-30)
        rank = min(int((kept < energy).sum(-1).max()) + 1, values.shape[-1])
    root = values[:, None, :rank].sqrt()
    return left[..., :rank] * root, right[:, :rank].transpose(-2, -1) * root


class DistanceBias(nn.Module):
    """Bias that falls with the squared distance, with a learned slope for each head.

    Distances are relative to half of the longer side of the queries' map. The slopes begin between 1 and 16.

    Args:
        num_heads: Number of heads.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.log_slope = nn.Parameter(torch.linspace(0, 4, num_heads) * torch.tensor(2.0).log())

    def no_weight_decay(self) -> set[str]:
        return {"log_slope"}

    def forward(self, q: Tensor, k: Tensor, size: Sequence[int], key_size: Sequence[int]) -> Factors:
        positions = [self.positions(n, size) for n in (size, key_size)]
        return distance_factors(positions[0], positions[1], self.log_slope.exp())

    def positions(self, size: Sequence[int], map_size: Sequence[int]) -> Tensor:
        """Return the centres (h * w, 2) of `size` cells that cover a map, whose longer side is from -1 to 1."""
        axes = []
        for cells, tokens in zip(size, map_size, strict=True):
            centres = (2 * torch.arange(cells, device=self.log_slope.device) + 1) / cells - 1
            axes.append(centres.to(self.log_slope.dtype) * (tokens / max(map_size)))
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


class LearnedBias(nn.Module):
    """Bias whose factors are learned for each position of a map, and interpolated for maps of another size.

    Args:
        num_heads: Number of heads.
        rank: Rank R.
        side: Side in tokens of the map that the factors are learned for.
    """

    def __init__(self, num_heads: int, rank: int, side: int):
        super().__init__()
        # The products begin with a standard deviation of 0.02
        std = (0.02 / rank**0.5) ** 0.5
        self.queries = nn.Parameter(std * torch.randn(num_heads, rank, side, side))
        self.keys = nn.Parameter(std * torch.randn(num_heads, rank, side, side))

    def no_weight_decay(self) -> set[str]:
        return {"queries", "keys"}

    def forward(self, q: Tensor, k: Tensor, size: Sequence[int], key_size: Sequence[int]) -> Factors:
        return resize_factors(self.queries, size), resize_factors(self.keys, key_size)

    @torch.no_grad()
    def approximate(self, bias: Tensor) -> None:
        """Set the factors to those of the best approximation of a bias (heads, side², side²)."""
        for parameter, phi in zip((self.queries, self.keys), svd_factors(bias, self.queries.shape[1]), strict=True):
            parameter.copy_(phi.transpose(-2, -1).reshape(parameter.shape))


class ContentBias(nn.Module):
    """Bias whose factors two small networks compute from the queries and from the keys, for all heads alike.

    Args:
        head_dim: Channels D of a head.
        rank: Rank R.
    """

    def __init__(self, head_dim: int, rank: int):
        super().__init__()
        self.queries, self.keys = (
            nn.Sequential(nn.Linear(head_dim, 2 * rank), nn.GELU(), nn.Linear(2 * rank, rank)) for _ in range(2)
        )

    def forward(self, q: Tensor, k: Tensor, size: Sequence[int], key_size: Sequence[int]) -> Factors:
        return self.queries(q), self.keys(k)


def resize_factors(factors: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate factors (heads, R, side, side) to a map of `size` (H, W): (heads, H * W, R)."""
    if factors.shape[2:] != tuple(size):
        factors = F.interpolate(factors, tuple(size), mode="bilinear")
    return factors.flatten(2).transpose(1, 2)
