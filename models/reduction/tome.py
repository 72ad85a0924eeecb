"""ToMe: Token Merging: Your ViT But Faster (Bolya et al., ICLR 2023, arXiv:2210.09461).

Written after the paper and the authors' repository, facebookresearch/ToMe (CC BY-NC 4.0), of which nothing is copied.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.reduction.groups import Groups, Step
from models.reduction.registry import Attended, Reduction, check_share, register_reduction


def match(keys: Tensor, extra: int, number: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: choose the pairs of tokens that are merged.

    Tokens at even and at odd positions, extra ones counted, are two sets. Each token of the first set has the most
    similar token of the second set as its partner, and the pairs with the highest similarity are merged.

    Args:
        keys: Features (B, n, D) by whose cosine tokens are compared.
        extra: Number of extra tokens E before these tokens, which take no part.
        number: Number of pairs, at most n // 2.

    Returns:
        The index of the token that each token becomes, (B, n), and the index of one token for each that is left,
        (B, n - number): those of the first set that stay, then the second set.
    """
    B, n, _ = keys.shape
    positions = torch.arange(n, device=keys.device)
    first, second = positions[extra % 2 :: 2], positions[1 - extra % 2 :: 2]
    units = F.normalize(keys, dim=-1)
    best, partners = (units[:, first] @ units[:, second].transpose(-2, -1)).max(-1)
    order = best.argsort(dim=1, descending=True)
    merged, kept = order[:, :number], order[:, number:]
    if extra:
        # The authors sort them only in a net with a class token, which then stays in front.
        kept = kept.sort(1).values
    left = kept.shape[1]
    sources = torch.cat([first[kept], second.expand(B, -1)], dim=1)
    targets = torch.arange(n - number, device=keys.device).expand(B, -1)
    targets = torch.zeros(B, n, dtype=torch.int64, device=keys.device).scatter(1, sources, targets)
    return targets.scatter(1, first[merged], left + partners.gather(1, merged)), sources


@register_reduction("tome")
class ToMe(Reduction):
    """In each block the most similar tokens are merged to their mean, weighted by the numbers of tokens in them.

    Tokens are compared by the cosine of their keys, the mean over the heads. Extra tokens are never merged. At the end,
    all tokens of the map are given back. A block merges half of the tokens at most.

    Args:
        keep: Share of the map's tokens that is left after the last block, above 0 and at most 1; default 0.5. Every
            block merges the same number of tokens, up to rounding.
        r: Number of tokens that each block merges, in place of `keep`; the paper's r.
        proportional: In the attention a token counts as often as there are tokens merged in it; default true. The paper
            leaves this out for nets of masked autoencoders.
        reduce_at: Indices of the blocks that merge tokens, between their attention and their MLP; by default all.

    Raises:
        ValueError: `keep` or `r` is out of its range.
    """

    restores = True

    def __init__(
        self,
        first: int,
        depth: int,
        keep: float = 0.5,
        r: int | None = None,
        proportional: bool = True,
        reduce_at: Sequence[int] | None = None,
    ):
        check_share("keep", keep)
        if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 0):
            raise ValueError(f"r must be a number of tokens of at least 0, not {r}")
        self.keep, self.r, self.proportional = keep, r, proportional
        nothing = keep == 1 if r is None else r == 0
        every = range(first, depth) if reduce_at is None else sorted(set(reduce_at))
        self.reduce_at = [] if nothing else list(every)

    def reduce(self, x: Tensor, attended: Attended, groups: Groups, number: int) -> Step:
        B, n, C = x.shape
        total = groups.owner.shape[1]
        merged = (1 - self.keep) * total / len(self.reduce_at) if self.r is None else self.r
        left = total - round(merged * (number + 1))
        keys = attended.k[:, :, attended.extra :].detach().mean(1)
        targets, sources = match(keys, attended.extra, min(max(n - left, 0), n // 2))
        counts = groups.counts().to(x.dtype).unsqueeze(-1)
        places = targets.unsqueeze(-1).expand(-1, -1, C + 1)
        # A further channel holds the numbers of tokens, so that one sum gives both parts of the mean.
        sums = x.new_zeros(B, sources.shape[1], C + 1).scatter_add(1, places, torch.cat([x * counts, counts], dim=-1))
        return Step(sums[..., :-1] / sums[..., -1:], targets, sources)

    @staticmethod
    def arguments_for(left: float) -> dict[str, Any]:
        return {"keep": left}
