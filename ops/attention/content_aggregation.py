"""Content-aware token aggregation of CATANet (Liu et al., CVPR 2025, arXiv:2503.06896).

Paper: CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution. Written after the
paper and the authors' repository, EquationWalker/CATANet (Apache-2.0). A stable order of tokens with the same centre,
where the authors' sort leaves it open, and the mirror image of a sequence shorter than its padding are ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.clusters import Centroids, mean_over_ranks, nearest_centroids, spherical_step
from ops.functional import merge_heads, split_heads
from ops.precision import at_least_float32, without_autocast
from ops.registry import FIRST, Place, register_op
from retinue.utils.arithmetic import ceil_div, round_up

# Centres and tokens of a group in each of four blocks in turn, as in the paper
CENTERS = (16, 32, 64, 128)
GROUPS = (256, 128, 64, 32)


def mirrored(order: Tensor, length: int) -> Tensor:
    """Continue a sequence (B, N) to (B, length): backwards from its end, then forwards from its start, and so on."""
    N = order.shape[1]
    place = torch.arange(length, device=order.device) % (2 * N)
    return order[:, torch.minimum(place, 2 * N - 1 - place)]


@register_op("content_aggregation")
class ContentAggregation(nn.Module):
    """Tokens are sorted by the nearest of a few centres and attend to tokens near in this order, and to all centres.

    The sorted tokens are cut into groups. The queries of a group attend to the keys of their own and of the next group;
    after the last token, the sequence goes on with its mirror image. The outputs of the attention to the groups and of
    that to the centres are added.

    The centres are an average of those of the training batches (`ops.clusters.Centroids`). In training, some steps of
    spherical k-means over the batch refine them, the last of which passes a gradient to the tokens. Before the first
    batch they are the means of equal parts of the sequence over the whole batch. Cost is proportional to
    H * W * (2 * group + centers).

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The block sets the defaults of `centers` and `group`.
        centers: Number of centres; by default 16, 32, 64 and 128 in the blocks of a stage in turn.
        group: Number of tokens of a group; by default 256, 128, 64 and 32 in turn. A smaller map is one group.
        qk_dim: Channels of queries and keys, a multiple of `num_heads`; by default 0.9 * dim, rounded to one.
        steps: Number of steps of k-means in training; default 5.
        decay: Weight of the old centres in the new ones at each step of training; default 0.999.

    Raises:
        ValueError: A number is out of its range.
    """

    family = "sparse"
    batch_statistics = True
    renames = (
        (r"^irca_attn\.to_", "center_"),
        (r"^iasa_attn\.(to_)?", ""),
        (r"^conv1x1\.", "out."),
        (r"^(means|initted)$", r"centers.\1"),
    )
    # A hook of the backward pass moves the centres
    fullgraph = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        centers: int | None = None,
        group: int | None = None,
        qk_dim: int | None = None,
        steps: int = 5,
        decay: float = 0.999,
    ):
        super().__init__()
        centers = CENTERS[place.block % 4] if centers is None else centers
        group = GROUPS[place.block % 4] if group is None else group
        if min(centers, group, steps) < 1 or not 0 <= decay <= 1:
            raise ValueError(
                f"centers, group and steps must be at least 1 and decay from 0 to 1, "
                f"not {centers}, {group}, {steps} and {decay}"
            )
        if qk_dim is None:
            qk_dim = num_heads * max(round(0.9 * dim / num_heads), 1)
        if qk_dim < 1 or qk_dim % num_heads:
            raise ValueError(f"qk_dim must be a multiple of {num_heads}, the number of heads, not {qk_dim}")
        self.num_heads, self.group, self.steps = num_heads, group, steps
        self.centers = Centroids(centers, dim, decay=decay)
        self.center_k = nn.Linear(dim, qk_dim, bias=False)
        self.center_v = nn.Linear(dim, dim, bias=False)
        self.q = nn.Linear(dim, qk_dim, bias=False)
        self.k = nn.Linear(dim, qk_dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        q, k, v = self.q(tokens), self.k(tokens), self.v(tokens)
        with without_autocast(x):
            unit = F.normalize(at_least_float32(tokens)[0], dim=-1)
            centers = self.locate(tokens, unit, q)
            order = nearest_centroids(unit.detach(), F.normalize(centers.detach(), dim=-1)).argsort(dim=-1, stable=True)
        centers = centers.to(x.dtype)

        by_group = self.attend_to_groups(q, k, v, order)
        queries, keys, values = (
            split_heads(t, self.num_heads).expand(x.shape[0], -1, -1, -1)
            for t in (q, self.center_k(centers)[None], self.center_v(centers)[None])
        )
        by_centers = merge_heads(F.scaled_dot_product_attention(queries, keys, values))
        return self.out(self.proj(by_group + by_centers)).view(x.shape)

    def locate(self, tokens: Tensor, unit: Tensor, q: Tensor) -> Tensor:
        """Return the centres (M, C) of this pass in at least float32; in training, refine and average them.

        Args:
            tokens: Tokens (B, N, C).
            unit: The normalised tokens.
            q: Queries, whose gradient is computed in every backward pass.
        """
        means = self.centers.means.to(unit.dtype, copy=True)
        if not self.centers.have_started():
            means = self.first(tokens)
        if not self.training:
            return means
        with torch.no_grad():
            for _ in range(self.steps - 1):
                means = spherical_step(unit, F.normalize(means, dim=-1))
        means = spherical_step(unit, F.normalize(means.detach(), dim=-1))
        self.centers.follow(means, after=q)
        return means

    def first(self, tokens: Tensor) -> Tensor:
        """Return the centres before the first batch: means of M equal parts of the sequence, mirrored at its end."""
        (N, M), dtype = (tokens.shape[1], len(self.centers.means)), at_least_float32(tokens)[0].dtype
        # The sequence always goes on, as in the authors' code: by M tokens where N is a multiple of M
        places = mirrored(torch.arange(N, device=tokens.device)[None], N + M - N % M)[0]
        means = tokens[:, places].to(dtype).unflatten(1, (M, -1)).mean((0, 2))
        return mean_over_ranks(means) if self.training else means

    def attend_to_groups(self, q: Tensor, k: Tensor, v: Tensor, order: Tensor) -> Tensor:
        """Return the attention of each token to its group and the next one.

        Args:
            q: Queries (B, N, E).
            k: Keys (B, N, E).
            v: Values (B, N, C).
            order: Indices of the sorted tokens (B, N).
        """
        N = q.shape[1]
        size = min(N, self.group)
        padded = mirrored(order, round_up(N, size) + size).unsqueeze(-1)
        groups = ceil_div(N, size)
        q = q.take_along_dim(padded[:, : groups * size], 1).unflatten(1, (groups, size))
        k, v = (t.take_along_dim(padded, 1).unflatten(1, (groups + 1, size)) for t in (k, v))
        k, v = (torch.cat([t[:, :-1], t[:, 1:]], dim=2) for t in (k, v))
        q, k, v = (split_heads(t, self.num_heads).flatten(0, 1) for t in (q, k, v))
        out = merge_heads(F.scaled_dot_product_attention(q, k, v)).view(len(order), groups * size, -1)
        return out.take_along_dim(order.argsort(-1).unsqueeze(-1), 1)
