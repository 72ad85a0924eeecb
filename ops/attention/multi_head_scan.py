"""Multi-head scan of MHS-VM (Ji, arXiv:2406.05992): scans along other routes in each head, fused by their variation.

Written after the paper and the authors' repository, PixDeep/MHS-VM (Apache-2.0). The authors store their routes for
given sizes; here they are computed for any size of the map.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.registry import FIRST, Place, register_op
from ops.scan import selective_scan
from ops.scan_orders import diagonals, positions, raster, scatter_orders, snake, spiral, to_orders
from ops.selective_scan import SelectiveScan
from ops.weighting import WeightedSums
from retinue.utils.arithmetic import ceil_div

# Letters of the authors for the routes of the heads, in their order
PATTERNS = "CXSZ"
FORMS = ("gated", "ungated", "plain")


@register_op("multi_head_scan")
class MultiHeadScan(nn.Module):
    """Each head has a share of the channels and runs a state over the map along two routes and their reverses.

    The routes of the heads are rows and columns with every second one backwards, diagonals, spirals from two corners,
    and rows and columns in raster order. The sum of a token's four outputs in a head is multiplied by their coefficient
    of variation, less a threshold. Nothing is padded. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Not used; the number of heads is `patterns`.
        patterns: Number of heads, 3 or 4 (the fourth has the raster routes); default 3. Each has dim // patterns
            channels.
        states: Number of states of each channel; default 16.
        threshold: What is subtracted from the coefficient of variation before it is rectified; default 0.
        form: What stands around the scans. "gated" (default; the authors' VSSGate): a projection to a map and a gate, a
            depthwise 3 x 3 convolution with SiLU before the scans, and a norm after them. "ungated" (VSSUnGated): the
            same without projection and gate. "plain" (MHSM): nothing.
        project: Normalise and project the heads' outputs together; default True. Without it `patterns` must divide
            `dim`.
    """

    family = "recurrent"
    renames = (
        (r"^(?:m\.)?(?:mhs\.)?", ""),
        (r"^x_ssproj(?:_W|\.weight)$", "x_proj.weight"),
        # The authors' files hold each weight of a head twice
        (r"^scanhead_\w\.mambaeng\.", None),
        *((rf"^scanhead_{pattern}\.scanning\.seq2seq_engine\.", f"heads.{i}.") for i, pattern in enumerate(PATTERNS)),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        patterns: int = 3,
        states: int = 16,
        threshold: float = 0.0,
        form: str = "gated",
        project: bool = True,
    ):
        super().__init__()
        if patterns not in (3, 4) or dim < patterns or states < 1:
            raise ValueError(
                f"patterns must be 3 or 4, and dim at least that and states at least 1, not {patterns}, {dim}, {states}"
            )
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
        if dim % patterns and not project:
            raise ValueError(f"project=False needs a dim that patterns divides, not {dim} and {patterns}")
        channels = dim // patterns
        self.threshold, self.form = threshold, form
        if form == "gated":
            self.in_proj = nn.Linear(dim, 2 * dim, bias=False)
        if form != "plain":
            self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
            self.out_norm = nn.LayerNorm(dim)
        self.x_proj = nn.Linear(dim, patterns * channels, bias=False)
        self.heads = nn.ModuleList(SelectiveScan(channels, states, ceil_div(channels, 16)) for _ in range(patterns))
        self.sums = WeightedSums(by_channel=True)
        self.cat_norm = nn.LayerNorm(patterns * channels) if project else nn.Identity()
        self.y_proj = nn.Linear(patterns * channels, dim, bias=False) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "plain":
            return self.scan(x)
        u, z = self.in_proj(x).chunk(2, dim=-1) if self.form == "gated" else (x, None)
        u = F.silu(self.conv2d(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        y = self.out_norm(self.scan(u))
        return y if z is None else y * F.silu(z)

    def scan(self, x: Tensor) -> Tensor:
        """Scan a map (B, H, W, C) in all heads, and join the heads: the same shape."""
        heads: list[tuple[Any, Tensor]] = list(
            zip(self.heads, self.x_proj(x).chunk(len(self.heads), dim=-1), strict=True)
        )
        routes = routes_of_heads(x.shape[1:3], x.device)[: len(heads)]
        # One call scans the sequences of all heads; axis -3 is that of the orders
        arguments = [head.arguments(part, route) for (head, part), route in zip(heads, routes, strict=True)]
        u, delta, A, B, C = (torch.cat(parts, dim=-3) for parts in zip(*arguments, strict=True))
        scanned = scatter_orders(selective_scan(u, delta, A, B, C), torch.cat(routes), x.shape[1:3])
        fused = [self.fuse(y, part, head.skip) for y, (head, part) in zip(scanned.split(4, dim=1), heads, strict=True)]
        return self.y_proj(self.cat_norm(torch.cat(fused, dim=-1).to(x.dtype)))

    def fuse(self, scanned: Tensor, u: Tensor, skip: Tensor) -> Tensor:
        """Sum the outputs y_r = scanned_r + skip_r * u of a head's four routes where they vary.

        What all y_r have in common is added after their variation is known, because it would cost the differences
        their digits.

        Args:
            scanned: Outputs of the scans (B, 4, H, W, E), in float32 at least.
            u: Input of the head (B, H, W, E).
            skip: Weights (4, E).
        """
        common = skip.mean(0)
        y = scanned + u.unsqueeze(1) * (skip - common)[:, None, None]
        variation = y.std(1) / ((y - y.amin(1, keepdim=True)).mean(1) + 1e-5)
        return (self.sums(y.sum(1)) + 4 * common * u) * F.relu(variation - self.threshold)


def routes_of_heads(size: Sequence[int], device: torch.device) -> list[Tensor]:
    """Return the four routes of each of four heads over a map of `size` (H, W): tensors (4, H * W)."""
    i, j = positions(size, device)
    upwards, leftwards = size[0] - 1 - i, size[1] - 1 - j
    pairs = (
        (snake(i, j), snake(j, i)),
        (diagonals(i, j), diagonals(i, leftwards)),
        (spiral(i, j), spiral(upwards, j)),
        (raster(i, j), raster(j, i)),
    )
    return [to_orders([a, -a, b, -b]) for a, b in pairs]
