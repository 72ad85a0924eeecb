"""Grouped-query attention, with query heads shared out evenly or by the norms of the keys.

Grouped queries: Ainslie et al., EMNLP 2023, arXiv:2305.13245. Key-driven (KDGQA) and dynamic (DGQA) allocation: Khan et
al., 2024, arXiv:2408.08454. Written after the papers and the authors' repository, Zohaib-Khan5040/key-driven-gqa (MIT).
Its PGQA subtracts noise from the attention's output in evaluation too; here evaluation subtracts the noise's mean.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.norm import RMSNorm
from ops.registry import FIRST, Place, register_op
from ops.softmax import SoftmaxOptions

ALLOCATIONS = ("uniform", "key_norm", "batch_key_norm", "key_change", "key_average")
# Share of the current norms in the average that decides with "key_average"
MOMENTUM = 0.9


@register_op("grouped_query")
class GroupedQueryAttention(nn.Module):
    """All tokens attend to all tokens; several query heads share one head of keys and values.

    The first query heads belong to the first key head, the next ones to the second, and so on. How many belong to each:

    - "uniform" (GQA): equally many. One key head gives multi-query attention (MQA), as many key heads as query heads
      give multi-head attention.
    - "key_norm" (KDGQA): in proportion to the norm of each key head's map, less the smallest of these norms. The norms
      are each image's own, so that an image's output does not depend on the rest of its batch.
    - "batch_key_norm": as "key_norm", with the norms summed over the batch as in the authors' code. The op then does
      not treat the images of a batch independently.
    - "key_change", "key_average" (DGQA): in proportion to the change of the batch's norms, or to their moving average.
      The allocation is renewed in every `interval`-th forward pass of training and keeps in evaluation, where the
      authors' code renews it in every pass. Ties of rounding are resolved as in "key_norm", in the authors' code at
      random.

    Cost is quadratic in H * W, as that of full attention; the projections of keys and values are smaller.

    Args:
        dim: Number of channels.
        num_heads: Number of query heads.
        kv_heads: Number of key and value heads, from 1 to `num_heads`; with "uniform" a divisor of `num_heads`.
            Default: the largest divisor of `num_heads` that is at most half of `num_heads`.
        allocation: One of the rules above; default "uniform".
        interval: Number of forward passes in training between two allocations of "key_change" and "key_average". It is
            even, so that gradient checkpointing, which runs each pass twice, repeats a pass with the same allocation.
        noise: Subtract from each head's output noise of the mean and deviation that the output has over tokens and
            channels (PGQA); in evaluation its mean. Default False.
        qkv_bias: Give the query, key and value projections a bias; default True.
        proj_bias: Give the output projection a bias; default True.
        qk_norm: Normalise each head's queries and keys by their root mean square, with a learned scale for each
            channel; default False.
    """

    family = "full"
    takes_extra = True
    softmax_options = True
    # From the names that language models use
    renames = ((r"^([qkv])_proj\.", r"\1."), (r"^o_proj\.", "proj."))
    cache: Tensor
    groups: Tensor
    passes: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        kv_heads: int | None = None,
        allocation: str = "uniform",
        interval: int = 300,
        noise: bool = False,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
    ):
        super().__init__()
        if kv_heads is None:
            kv_heads = next((n for n in range(num_heads // 2, 0, -1) if num_heads % n == 0), 1)
        if allocation not in ALLOCATIONS:
            raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}, not {allocation!r}")
        if not 1 <= kv_heads <= num_heads or (allocation == "uniform" and num_heads % kv_heads):
            divisor = "a divisor of" if allocation == "uniform" else "at most"
            raise ValueError(
                f"kv_heads must be positive and {divisor} {num_heads}, the number of heads, not {kv_heads}"
            )
        if interval < 2 or interval % 2:
            raise ValueError(f"interval must be positive and even, not {interval}")
        self.num_heads, self.kv_heads, self.allocation, self.interval = num_heads, kv_heads, allocation, interval
        self.noise = noise
        self.softmax = SoftmaxOptions(num_heads, dim // num_heads, place)
        width = dim // num_heads * kv_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, width, bias=qkv_bias)
        self.v = nn.Linear(dim, width, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.q_norm, self.k_norm = (RMSNorm(dim // num_heads, 1e-6) if qk_norm else nn.Identity() for _ in range(2))
        self.dynamic = allocation in ("key_change", "key_average")
        if self.dynamic:
            self.register_buffer("cache", torch.zeros(kv_heads))
            self.register_buffer("groups", torch.arange(num_heads) * kv_heads // num_heads)
            self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        size, E = x.shape[1:3], 0 if extra is None else extra.shape[1]
        tokens = x.flatten(1, 2) if extra is None else torch.cat([extra, x.flatten(1, 2)], dim=1)
        q = self.q_norm(split_heads(self.q(tokens), self.num_heads))
        k, v = (split_heads(t, self.kv_heads) for t in (self.k(tokens), self.v(tokens)))
        out = self.proj(merge_heads(self.attend_heads(q, self.k_norm(k), v, size)))
        x = out[:, E:].unflatten(1, size)
        return x if extra is None else (x, out[:, :E])

    def attend_heads(self, q: Tensor, k: Tensor, v: Tensor, size: Sequence[int]) -> Tensor:
        """Return the heads' outputs (B, heads, N, D) for q (B, heads, N, D) and k, v (B, kv_heads, N, D).

        The last tokens are a map of `size` (H, W).
        """
        groups = self.allocate(k.detach())
        # One index for each image and query head, or one for each query head
        index = (
            (torch.arange(k.shape[0], device=k.device)[:, None], groups) if groups.ndim == 2 else (slice(None), groups)
        )
        q, k, scale = self.softmax(q, k[index], size)
        out = F.scaled_dot_product_attention(q, k, v[index], scale=scale)
        return out - noise_like(out, self.training) if self.noise else out

    def allocate(self, k: Tensor) -> Tensor:
        """Return the index of each query head's key head, (heads,) or (B, heads), for keys (B, kv_heads, N, D)."""
        if self.allocation == "uniform":
            return torch.arange(self.num_heads, device=k.device) * self.kv_heads // self.num_heads
        norms = k.float().flatten(2).norm(dim=2)
        if self.allocation != "key_norm":
            norms = norms.sum(0)
        if self.dynamic:
            return self.renew(norms) if self.training else self.groups
        return share_out(norms - norms.amin(-1, keepdim=True), self.num_heads)

    def renew(self, norms: Tensor) -> Tensor:
        """Return the key head of each query head, (heads,), renewed if it is due, and count the forward pass.

        Args:
            norms: Norm of each key head, summed over the batch: (kv_heads,).
        """
        cache = self.cache.float()
        change = (cache - norms).abs()
        weights = change if self.allocation == "key_change" else MOMENTUM * norms + (1 - MOMENTUM) * cache
        due = self.passes % self.interval == 0
        groups = torch.where(due, share_out(weights, self.num_heads), self.groups)
        self.groups.copy_(groups)
        self.cache.copy_(torch.where(due, (cache + norms) / self.interval, cache))
        self.passes.add_(1)
        return groups


def noise_like(out: Tensor, random: bool) -> Tensor:
    """Return PGQA's noise for the heads' outputs (B, heads, N, D), which broadcasts to them, or its mean.

    Uniform noise, the same for all images, is scaled to the mean and the deviation of each head's output.
    """
    mean = out.mean((2, 3), keepdim=True)
    if not random:
        return mean
    noise = torch.rand(out.shape[1:], device=out.device, dtype=out.dtype)
    noise = noise - noise.mean((1, 2), keepdim=True)
    # One token of one channel has no deviation.
    deviation = noise.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-6)
    # The small number keeps the gradient of the root finite where the output has no deviation.
    scale = out.float().var((2, 3), keepdim=True, correction=0).add(1e-12).sqrt().to(out.dtype)
    return mean + noise / deviation * scale


def share_out(weights: Tensor, heads: int) -> Tensor:
    """Share out query heads among key heads in proportion to the key heads' weights.

    Rounded shares that add up to too many heads are corrected by taking one from the largest share, those that add up
    to too few by giving one to the smallest, until the sum is right.

    Args:
        weights: Weights of the key heads, at least 0: (..., kv_heads). If all are 0, they count as equal.
        heads: Number of query heads.

    Returns:
        Index of each query head's key head, in ascending order: (..., heads).
    """
    count = weights.shape[-1]
    total = weights.sum(-1, keepdim=True)
    shares = torch.where(total > 0, weights / total, 1 / count)
    numbers = (shares * heads).round().long()
    # Rounding changes each share by at most one half.
    for _ in range(count // 2):
        excess = numbers.sum(-1, keepdim=True) - heads
        largest, smallest = (F.one_hot(i, count) for i in (numbers.argmax(-1), numbers.argmin(-1)))
        numbers = numbers - largest * (excess > 0) + smallest * (excess < 0)
    places = torch.arange(heads, device=weights.device)
    return (places[:, None] >= numbers.cumsum(-1)[..., None, :]).sum(-1)
