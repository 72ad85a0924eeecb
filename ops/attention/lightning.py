"""Lightning attention: linear attention with a norm instead of a normaliser (Qin et al., arXiv:2405.17381).

Written after the paper and the authors' repository, OpenNLPLab/lightning-attention (MIT). The authors' form is causal,
for text; the forms for maps are ours.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.linear import linear_attention
from ops.precision import at_least_float32
from ops.registry import FIRST, Place, register_op
from ops.scan import gated_linear_attention
from ops.weighting import Values, WeightedSums

FORMS = ("all", "causal", "both_ways", "four_ways", "axial")


@register_op("lightning")
class LightningAttention(nn.Module):
    """Tokens attend linearly to all tokens, or to those on a path, with weights that decay along the path.

    Queries, keys and values pass SiLU, the weights are the products of queries and keys without a normaliser, and a
    LayerNorm and a low-rank gate follow. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The block and the depth set the decay: it becomes weaker from block to block and all but ends in the last
            one, as in the authors' net.
        form: "all" (default): all tokens, without decay. "causal" (the authors'): the tokens before it in raster order.
            "both_ways": the tokens before and after it in raster order. "four_ways": the sum of "both_ways" in raster
            order and in the order of columns. "axial": the tokens of the column, and then those of the row.
        decay: Let the weights decay with the distance along the path; default True. The form "all" has no decay.
        bias: Give the projections a bias; default False.
    """

    family = "linear"
    renames = ((r"^o_proj\.", "proj."),)

    log_decay: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        form: str = "all",
        decay: bool = True,
        bias: bool = False,
    ):
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
        self.num_heads, self.form = num_heads, form
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        self.values, self.sums = Values(), WeightedSums()
        self.norm = nn.LayerNorm(dim)
        rank = dim // num_heads
        self.output_gate = nn.Sequential(nn.Linear(dim, rank, bias=bias), nn.Linear(rank, dim, bias=bias))
        weaker = 1 - place.block / max(place.depth - 1, 1) + 1e-5
        slopes = torch.tensor(slopes_of_heads(num_heads)) * weaker * decay
        self.register_buffer("log_decay", -slopes.view(-1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.silu(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        # Sums over many tokens may be out of the range of half precision until they are normalised
        out = self.sums(self.attend(q, k, *at_least_float32(self.values(v))))
        weight, bias = (t.to(out.dtype) for t in (self.norm.weight, self.norm.bias))
        out = F.layer_norm(out, self.norm.normalized_shape, weight, bias, self.norm.eps).to(x.dtype)
        return self.proj(out * self.output_gate(x).sigmoid())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from the queries (B, H, W, C) to the keys and values of the same shape, of the values' type."""
        if self.form == "all":
            tokens = (q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2))
            return linear_attention(tokens, self.num_heads, "identity", "none").view_as(v)
        if self.form == "axial":
            columns = self.along(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
            return self.along(q, k, columns)
        rows = self.along(*(t.flatten(1, 2) for t in (q, k, v))).view_as(v)
        if self.form != "four_ways":
            return rows
        columns = self.along(*(t.transpose(1, 2).flatten(1, 2) for t in (q, k, v)))
        return rows + columns.unflatten(1, (v.shape[2], v.shape[1])).transpose(1, 2)

    def along(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend along sequences (..., N, C)."""
        q, k, v = (split_heads(t, self.num_heads) for t in (q, k, v))
        log_decay = self.log_decay.to(v.dtype).expand(-1, q.shape[-2])
        return merge_heads(gated_linear_attention(q, k, v, log_decay, self.form != "causal"))


def slopes_of_heads(num_heads: int) -> list[float]:
    """Return the decay of each head for a step, as in ALiBi (Press et al., ICLR 2022, arXiv:2108.12409).

    For n heads, a power of two, it is 2^(-8 t / n) for t = 1, ..., n. For other numbers, the decays of the next smaller
    power of two are followed by every second one of twice that power.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * (t + 1) / power) for t in range(power)]
    if power == num_heads:
        return slopes
    return slopes + slopes_of_heads(2 * power)[::2][: num_heads - power]
