"""Attention inside clusters of similar tokens, of the Routing Transformer (Roy et al., TACL 2021, arXiv:2003.05997).

Paper: Efficient Content-Based Sparse Attention with Routing Transformers. Written after the paper and the repository
lucidrains/routing-transformer (MIT). Neighbourhoods of a map for the local heads, instead of blocks of a sequence, are
ours, and so are clusters that grow on maps with more tokens than they were made for.
"""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ops.clusters import Centroids, nearest_centroids, spherical_step
from ops.functional import merge_heads, split_heads
from ops.losses import Losses
from ops.neighborhood import neighborhood_attention
from ops.precision import at_least_float32, without_autocast
from ops.registry import FIRST, Place, register_op
from retinue.utils.arithmetic import ceil_div

LOCAL_SIDE = 7
# Tokens of a cluster at an image of 224 pixels, and the fewest of any image, by default
CLUSTER_SIZE, MIN_CLUSTER_SIZE = 49, 8
# Score of a token with itself where queries serve as keys, so that it attends to itself only if it is alone
SELF_SCORE = -5e4


@register_op("cluster_routing")
class ClusterRoutingAttention(nn.Module):
    """Tokens attend to each other inside clusters, which centroids of k-means choose; half of the heads are local.

    Each centroid of a head takes the queries and the keys that are most similar to it, equally many of both, so a token
    may be in several clusters, whose outputs are averaged, or in none, where a routed head gives 0. Local heads attend
    to a neighbourhood of 7 x 7 tokens, with a learned bias for each relative position; a map that is smaller is
    zero-padded to that size for them. The centroids follow the normalised queries and keys of the training batches
    (`ops.clusters.Centroids`). The loss `commitment` is the mean squared distance of these to their nearest centroid.
    Cost is proportional to clusters * (cluster_size^2 + H * W).

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stride sets the default of `clusters`.
        cluster_size: Number of queries and of keys in a cluster, at most the number of tokens. By default, and on a
            map with more than clusters * cluster_size tokens, the number of tokens divided by `clusters`; the default
            is at least 8.
        clusters: Number of centroids of a head; by default the number of tokens at an image of 224 pixels divided by
            49, or by `cluster_size`, at least 1.
        local_heads: Number of heads that are local; by default num_heads // 2, as in the paper.
        shared_qk: Use the normalised queries as keys; a token then attends to itself only if its cluster has no other
            token. Default False.
        decay: Weight of the old centroids in the new ones at each step of training; default 0.999.

    Raises:
        ValueError: A number is out of its range.
    """

    family = "sparse"
    loss_weights = (("commitment", 1e-4),)
    renames = ((r"^global_attn\.kmeans\.", "kmeans."), (r"^global_attn\.mem_(key|value)$", None))
    value_layers = ("to_v", "local_to_qkv")
    # A hook of the backward pass moves the centroids
    fullgraph = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        cluster_size: int | None = None,
        clusters: int | None = None,
        local_heads: int | None = None,
        shared_qk: bool = False,
        decay: float = 0.999,
    ):
        super().__init__()
        local_heads = num_heads // 2 if local_heads is None else local_heads
        typical_size = CLUSTER_SIZE if cluster_size is None else cluster_size
        if typical_size < 1 or not 0 <= local_heads < num_heads or not 0 <= decay <= 1:
            raise ValueError(
                f"cluster_size must be at least 1, local_heads from 0 to {num_heads - 1} and decay from 0 to 1, "
                f"not {typical_size}, {local_heads} and {decay}"
            )
        if clusters is None:
            clusters = max(ceil_div(224, place.stride) ** 2 // typical_size, 1)
        if clusters < 1:
            raise ValueError(f"clusters must be at least 1, not {clusters}")
        self.num_heads, self.local_heads, self.routed_heads = num_heads, local_heads, num_heads - local_heads
        self.min_size, self.clusters = MIN_CLUSTER_SIZE if cluster_size is None else cluster_size, clusters
        head_dim = dim // num_heads
        routed, local = self.routed_heads * head_dim, local_heads * head_dim
        # The names of the repository
        self.to_q = nn.Linear(dim, routed, bias=False)
        self.to_k = None if shared_qk else nn.Linear(dim, routed, bias=False)
        self.to_v = nn.Linear(dim, routed, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.kmeans = Centroids(self.routed_heads, clusters, head_dim, decay=decay)
        self.local_to_qkv = self.relative_position_bias_table = None
        if local_heads:
            self.local_to_qkv = nn.Linear(dim, 3 * local)
            side = 2 * LOCAL_SIDE - 1
            self.relative_position_bias_table = nn.Parameter(torch.empty(local_heads, side, side))
            trunc_normal_(self.relative_position_bias_table, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {"relative_position_bias_table"}

    def forward(self, x: Tensor, losses: Losses | None = None) -> Tensor:
        H, W = x.shape[1:3]
        out = self.route(x.flatten(1, 2), losses).unflatten(1, (H, W))
        if self.local_to_qkv is not None:
            pad_h, pad_w = (max(LOCAL_SIDE - side, 0) for side in (H, W))
            qkv = self.local_to_qkv(F.pad(x, (0, 0, 0, pad_w, 0, pad_h)))
            bias, kernel = self.relative_position_bias_table, (LOCAL_SIDE, LOCAL_SIDE)
            out = torch.cat([neighborhood_attention(qkv, bias, self.local_heads, kernel)[:, :H, :W], out], dim=-1)
        return self.to_out(out)

    def route(self, tokens: Tensor, losses: Losses | None) -> Tensor:
        """Return the output of the routed heads for tokens (B, N, C): (B, N, routed_heads * D)."""
        q, v = (split_heads(t, self.routed_heads) for t in (self.to_q(tokens), self.to_v(tokens)))  # (B, heads, N, D)
        k = None if self.to_k is None else split_heads(self.to_k(tokens), self.routed_heads)
        with without_autocast(tokens):
            unit = [F.normalize(t, dim=-1) for t in at_least_float32(*([q] if k is None else [q, k]))]
            means = self.learn(torch.cat(unit, dim=2), q, losses)
            # Each centroid's tokens, the most similar ones
            N = tokens.shape[1]
            size = min(max(self.min_size, ceil_div(N, self.clusters)), N)
            scores = (t.detach() @ means.transpose(-2, -1) for t in unit)
            # Indices of the tokens, (B, heads, K * size, 1)
            chosen = [t.topk(size, dim=2).indices.mT.flatten(2).unsqueeze(-1) for t in scores]

        in_clusters = lambda t, index: t.take_along_dim(index, 2).unflatten(2, (self.clusters, -1))  # noqa: E731
        k = unit[0].to(q.dtype) if k is None else k
        q, k, v = (in_clusters(*pair).flatten(0, 1) for pair in ((q, chosen[0]), (k, chosen[-1]), (v, chosen[-1])))
        mask = None
        if self.to_k is None:
            mask = torch.diag(q.new_full((size,), SELF_SCORE))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).unflatten(0, (-1, self.routed_heads))

        out, index = out.flatten(2, 3), chosen[0]
        sums = out.new_zeros(*out.shape[:2], N, out.shape[-1]).scatter_add(2, index.expand_as(out), out)
        counts = out.new_zeros(*out.shape[:2], N, 1).scatter_add(2, index, torch.ones_like(out[..., :1]))
        return merge_heads(sums / (counts + 1e-5))

    def learn(self, unit: Tensor, q: Tensor, losses: Losses | None) -> Tensor:
        """Return the centroids, move them towards the normalised queries and keys in training, and add the loss.

        Args:
            unit: Normalised queries and keys (B, heads, M, D).
            q: Queries, whose gradient is computed in every backward pass.
            losses: Receives the loss `commitment`.
        """
        if self.training:
            self.kmeans.start(unit.detach())
        means = self.kmeans.means.to(unit.dtype, copy=True)
        if losses is not None:
            nearest = nearest_centroids(unit.detach(), means).unsqueeze(-1)
            losses.add("commitment", F.mse_loss(unit, means.unsqueeze(0).take_along_dim(nearest, -2)))
        if self.training:
            self.kmeans.follow(spherical_step(unit.detach(), means), after=q)
        return means
