"""Selective scans of a map along several orders, with their own weights for each order, and the mixer around them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.scan import selective_scan
from ops.scan_orders import gather_orders, scatter_orders
from ops.weighting import Values, WeightedSums
from retinue.utils.arithmetic import ceil_div

# Shortest and longest step at the start of training
SHORTEST, LONGEST = 1e-3, 0.1


class SelectiveScan(nn.Module):
    """The selective state space model of Mamba along K orders of a map, as VMamba (arXiv:2401.10166) builds it.

    Each order has its own weights, which compute the steps and the weights of the states from the tokens.

    Args:
        channels: Number of channels E.
        states: Number of states S of each channel.
        rank: Number of values from which a token's steps are computed.
        scans: Number of orders K.
    """

    def __init__(self, channels: int, states: int, rank: int, scans: int = 4):
        super().__init__()
        self.states, self.rank, self.scans = states, rank, scans
        self.values = Values()
        bound = channels**-0.5
        self.x_proj_weight = nn.Parameter(torch.empty(scans, rank + 2 * states, channels).uniform_(-bound, bound))
        self.dt_projs_weight = nn.Parameter(torch.empty(scans, channels, rank).uniform_(-(rank**-0.5), rank**-0.5))
        steps = torch.empty(scans, channels).uniform_(math.log(SHORTEST), math.log(LONGEST)).exp()
        # The inverse of softplus
        self.dt_projs_bias = nn.Parameter(steps + (-(-steps).expm1()).log())
        self.A_logs = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(scans * channels, 1))
        self.Ds = nn.Parameter(torch.ones(scans * channels))

    def no_weight_decay(self) -> set[str]:
        return {"A_logs", "Ds"}

    @property
    def skip(self) -> Tensor:
        """Weights from each channel of the input to the output: (K, E)."""
        return self.Ds.unflatten(0, (self.scans, -1))

    def forward(self, x: Tensor, orders: Tensor, first: Tensor | None = None) -> Tensor:
        """Scan a map without its direct way from the input to the output, which is `skip` times the input.

        Args:
            x: Map (B, H, W, E).
            orders: The tokens' raster indices in each order: (K, H * W).
            first: True where a state starts anew in an order: (K, H * W).

        Returns:
            Maps (B, K, H, W, E), in float32 at least.
        """
        return scatter_orders(selective_scan(*self.arguments(x, orders), first), orders, x.shape[1:3])

    def arguments(self, x: Tensor, orders: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return u, delta, A, B and C of `ops.scan.selective_scan`; the arguments are those of `forward`."""
        u = gather_orders(x, orders)  # (B, K, N, E)
        weights = u @ self.x_proj_weight.transpose(1, 2)
        low_rank, B, C = weights.split((self.rank, self.states, self.states), dim=-1)
        # Short steps need float32
        raw = (low_rank @ self.dt_projs_weight.transpose(1, 2)).to(torch.promote_types(x.dtype, torch.float32))
        delta = F.softplus(raw + self.dt_projs_bias.unsqueeze(1))
        A = -self.A_logs.to(delta.dtype).exp().unflatten(0, (self.scans, -1))
        return self.values(u, x), delta, A, B, C


class SS2D(nn.Module):
    """The mixer of VMamba and LaMamba: a depthwise convolution, selective scans along four orders, a norm and a gate.

    Args:
        dim: Number of channels C.
        states: Number of states of each channel.
        expansion: Number of inner channels, relative to C.
        kernel: Side of the depthwise convolution, odd; 1 leaves it out.

    Raises:
        ValueError: An argument is out of its range.
    """

    renames = ((r"^((?:x_proj|dt_projs)_weight|dt_projs_bias|A_logs|Ds)$", r"scan.\1"),)

    def __init__(self, dim: int, states: int, expansion: float, kernel: int):
        super().__init__()
        inner = int(expansion * dim)
        if states < 1 or inner < 1:
            raise ValueError(f"states and expansion * dim must be at least 1, not {states} and {expansion} * {dim}")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 1, not {kernel}")
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = None
        if kernel > 1:
            self.conv2d = nn.Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner, bias=False)
        self.scan = SelectiveScan(inner, states, ceil_div(dim, 16))
        self.sums = WeightedSums(by_channel=True)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, orders: Tensor, first: Tensor | None = None) -> Tensor:
        """Mix a map (B, H, W, C) along `orders` (4, H * W); `first` as in `SelectiveScan`."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        if self.conv2d is not None:
            u = self.conv2d(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        u = F.silu(u)
        y = self.sums(self.scan(u, orders, first).sum(1)) + u * self.scan.skip.sum(0)
        return self.out_proj(self.out_norm(y.to(x.dtype)) * F.silu(z))
