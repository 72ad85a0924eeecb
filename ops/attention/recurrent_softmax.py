"""Attention as a recurrence, Aaren (Feng et al., arXiv:2405.13956): softmax attention with learned queries, by a scan.

No code of the authors was found. The scan follows the paper's abstract and two re-implementations that agree on it. One
query for each direction, layer and head, the factor on the scores and the directions over a map are ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.precision import at_least_float32, without_autocast
from ops.registry import FIRST, Place, register_op
from ops.scan import linear_recurrence

# The kind of each direction's scan, and the axes of (..., H, W, C) that are reversed for it
DIRECTIONS = {
    "lines": (("rows", ()), ("rows", (-2,)), ("columns", ()), ("columns", (-3,))),
    "raster": (("raster", ()), ("raster", (-3, -2))),
    "quadrants": (("quadrant", ()), ("quadrant", (-2,)), ("quadrant", (-3,)), ("quadrant", (-3, -2))),
    "causal": (("raster", ()),),
}


@register_op("recurrent_softmax")
class RecurrentSoftmax(nn.Module):
    """Each token receives a softmax-weighted mean of the values of all tokens before it, in several directions.

    The queries are learned and do not depend on the tokens, so the score of a token is the same for all later tokens,
    and a scan computes all means. Nothing is padded. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        directions: "lines" (default): both directions of the token's row and of its column. "raster": the tokens before
            and after it in raster order. "quadrants": the four rectangles from the token to a corner of the map.
            "causal": the tokens before it in raster order. The token itself always counts.
        join: How directions are joined. "mean" (default): each head runs in all directions, with a query for each, and
            their outputs are averaged. "heads": the heads are divided among the directions.
        scale: Factor on the scores; by default (dim / num_heads)^-0.5.
    """

    family = "recurrent"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        directions: str = "lines",
        join: str = "mean",
        scale: float | None = None,
    ):
        super().__init__()
        if directions not in DIRECTIONS:
            raise ValueError(f"directions must be one of {', '.join(DIRECTIONS)}, not {directions!r}")
        self.directions, self.join = DIRECTIONS[directions], join
        if join not in ("mean", "heads"):
            raise ValueError(f"join must be 'mean' or 'heads', not {join!r}")
        if join == "heads" and num_heads < len(self.directions):
            raise ValueError(f"join 'heads' needs at least {len(self.directions)} heads, not {num_heads}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        queries = len(self.directions) if join == "mean" else 1
        self.q = nn.Parameter(torch.empty(queries, num_heads, dim // num_heads))
        nn.init.trunc_normal_(self.q, std=0.02)
        # A bias of the keys would change all scores of a query alike
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def no_weight_decay(self) -> set[str]:
        return {"q"}

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)  # (B, heads, H, W, D)
        with without_autocast(x):
            q, k, v = at_least_float32(self.q, k, v)
            scores = (k @ (q[:, None, :, None, :, None] * self.scale)).unbind()  # (B, heads, H, W, 1)
            if self.join == "mean":
                means = [running_mean(s, v, *way) for s, way in zip(scores, self.directions, strict=True)]
                out = torch.stack(means).mean(0)
            else:
                shares = (t.tensor_split(len(self.directions), dim=1) for t in (scores[0], v))
                means = [running_mean(s, part, *way) for s, part, way in zip(*shares, self.directions, strict=True)]
                out = torch.cat(means, dim=1)
        return self.proj(out.permute(0, 2, 3, 1, 4).flatten(3).to(x.dtype))


def running_mean(scores: Tensor, v: Tensor, kind: str, reverse: tuple[int, ...]) -> Tensor:
    """Average the values before each token and its own, weighted by the exponentials of the scores.

    Args:
        scores: Scores (..., H, W, 1).
        v: Values (..., H, W, D).
        kind: "rows", "columns", "raster" or "quadrant", which runs along rows and then along columns.
        reverse: Axes of `v`, -3 or -2, along which the order is reversed.

    Returns:
        Tensor (..., H, W, D).
    """
    scores, v = scores.flip(reverse), v.flip(reverse)
    # A state is a reference score and the sums of the weights, relative to it, and of the weighted values
    state = (scores, torch.cat([torch.ones_like(scores), v], dim=-1))
    if kind == "raster":
        state = tuple(t.flatten(-3, -2) for t in state)
    if kind != "columns":
        state = accumulate(*state)
    if kind in ("columns", "quadrant"):
        state = accumulate(*(t.transpose(-3, -2) for t in state))
        state = tuple(t.transpose(-3, -2) for t in state)
    sums = state[1].view_as(F.pad(v, (1, 0))) if kind == "raster" else state[1]
    return (sums[..., 1:] / sums[..., :1]).flip(reverse)


def accumulate(reference: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Add the states (..., N, 1) and (..., N, 1 + D) from the start of a sequence to each position.

    The reference of a sum is the largest reference so far. The result does not depend on the choice of references, so
    they get no gradients.
    """
    highest = reference.detach().cummax(-2).values
    before = F.pad(highest[..., :-1, :], (0, 0, 1, 0), value=-torch.inf)
    return highest, linear_recurrence((before - highest).exp(), sums * (reference - highest).exp())
