"""ProbSparse attention of Informer (Zhou et al., AAAI 2021, arXiv:2012.07436).

Paper: Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting. Written after the paper and the
authors' repository, zhouhaoyi/Informer2020 (Apache-2.0). The depthwise convolution of the values is ours, and so is the
fixed sample of keys in evaluation, where the authors draw anew.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.precision import at_least_float32
from ops.registry import FIRST, Place, register_op
from retinue.utils.arithmetic import ceil_div

MEASURES = ("sum", "mean")


def spread(count: int, size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Return tokens in the centres of `count` cells of nearly equal size, into which a map (H, W) is cut: (count,)."""
    H, W = size
    rows = min(max(round((count * H / W) ** 0.5), ceil_div(count, W)), count, H)
    cell = torch.arange(count, device=device)
    # Row of each cell, where row r has the cells from r * count // rows on
    row = ((cell + 1) * rows - 1) // count
    first, end = row * count // rows, (row + 1) * count // rows
    return (2 * row + 1) * H // (2 * rows) * W + (2 * (cell - first) + 1) * W // (2 * (end - first))


@register_op("prob_sparse")
class ProbSparseAttention(nn.Module):
    """The few queries with the most peaked scores attend to all tokens; all other tokens get the mean of the values.

    The measure of a query is its largest score minus the sum of its scores, with u keys that are drawn for each query,
    divided by the number of all keys. Each head of each image chooses the u queries with the largest measure, with
    u = factor * ceil(ln(H * W)). The choice passes no gradient. The drawn keys are the same for all heads and images;
    in evaluation, one sample that is spread evenly over the map serves all queries. Extra tokens always attend to all
    tokens. Cost is proportional to H * W * ln(H * W).

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        factor: Number of drawn keys, and of chosen queries, relative to ceil(ln(H * W)); default 5.
        measure: "sum" (default), the measure of the authors' code; "mean", that of the paper, which divides by u.
        lepe_kernel: Side of the depthwise convolution of the values that is added to the output, odd; default 5. 0: no
            convolution.
        causal: Tokens attend to no later token, in row-major order, and the sum of the values so far replaces the mean;
            default False.
        mix: Join heads and tokens in the other order, as the authors' causal decoder does; default False.

    Raises:
        ValueError: A value is out of its range.
    """

    family = "sparse"
    takes_extra = True
    renames = (
        (r"^query_projection\.", "q."),
        (r"^key_projection\.", "k."),
        (r"^value_projection\.", "v."),
        (r"^out_projection\.", "proj."),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        factor: int = 5,
        measure: str = "sum",
        lepe_kernel: int = 5,
        causal: bool = False,
        mix: bool = False,
    ):
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor must be at least 1, not {factor}")
        if measure not in MEASURES:
            raise ValueError(f"measure must be 'sum' or 'mean', not {measure!r}")
        if lepe_kernel < 0 or (lepe_kernel and lepe_kernel % 2 == 0):
            raise ValueError(f"lepe_kernel must be odd or 0, not {lepe_kernel}")
        self.num_heads, self.factor, self.measure, self.causal, self.mix = num_heads, factor, measure, causal, mix
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, lepe_kernel, padding=lepe_kernel // 2, groups=dim) if lepe_kernel else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        H, W = x.shape[1:3]
        count = min(self.factor * max(math.ceil(math.log(H * W)), 1), H * W)
        if self.training:
            sample = torch.randint(H * W, (H * W, count), device=x.device)
        else:
            sample = spread(count, (H, W), x.device).unsqueeze(0)
        return self.attend(x, sample, extra)

    def attend(self, x: Tensor, sample: Tensor, extra: Tensor | None = None) -> Any:
        """Return the output for drawn keys.

        Args:
            x: Map (B, H, W, C).
            sample: Keys, tokens of the map, that are drawn for each query of the map (H * W, u), or for all (1, u).
            extra: Extra tokens (B, E, C).
        """
        size, E = x.shape[1:3], 0 if extra is None else extra.shape[1]
        tokens = x.flatten(1, 2) if extra is None else torch.cat([extra, x.flatten(1, 2)], dim=1)
        values = self.v(tokens)
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q(tokens), self.k(tokens), values))
        chosen = self.choose(q[:, :, E:], k[:, :, E:], sample) + E
        always = torch.arange(E, device=x.device).expand(*chosen.shape[:2], -1)
        chosen = torch.cat([always, chosen], dim=2).unsqueeze(-1)  # (B, heads, E + u, 1)

        mask, others = None, v.mean(2, keepdim=True)
        if self.causal:
            places = torch.arange(tokens.shape[1], device=x.device)
            mask = (places <= chosen) | (chosen < E)
            others = v.cumsum(2)
        attended = F.scaled_dot_product_attention(q.take_along_dim(chosen, 2), k, v, attn_mask=mask)
        out = others.expand_as(v).scatter(2, chosen.expand_as(attended), attended)
        out = out.reshape(tokens.shape) if self.mix else merge_heads(out)
        if self.lepe is not None:
            on_map = values[:, E:].transpose(1, 2).unflatten(2, size)
            out = out + F.pad(self.lepe(on_map).flatten(2).transpose(1, 2), (0, 0, E, 0))
        out = self.proj(out)
        x = out[:, E:].unflatten(1, size)
        return x if extra is None else (x, out[:, :E])

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, sample: Tensor) -> Tensor:
        """Return the queries with the largest measure: (B, heads, u).

        Args:
            q: Queries (B, heads, N, D).
            k: Keys (B, heads, N, D).
            sample: Drawn keys (N, u) or (1, u).
        """
        q, k = at_least_float32(q, k)
        count = sample.shape[1]
        if len(sample) == 1:
            scores = q @ k[:, :, sample[0]].transpose(-2, -1)
        else:
            # One key for each query at a time, since all of them would take u times the memory of the keys
            scores = torch.stack([(q * k[:, :, keys]).sum(-1) for keys in sample.unbind(1)], dim=-1)
        divisor = count if self.measure == "mean" else k.shape[2]
        return (scores.amax(-1) - scores.sum(-1) / divisor).topk(count).indices
