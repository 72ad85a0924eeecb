"""Content-based token pruning of EET, a net for fine-grained image retrieval.

Written after the authors' repository, WhiteJiang/EET (no licence file), without its hashing and its teacher.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from models.reduction.groups import Groups, Step, keep_best
from models.reduction.registry import Attended, Reduction, check_share, register_reduction


@register_reduction("eet")
class EETReduction(Reduction):
    """Tokens are dropped after the block by a score in which a head counts by the norm of its output at the token.

    The score of a token is the sum over the heads of the class token's attention to the token times the share of the
    head's output in the norms of all heads' outputs at the token.

    Args:
        keep: Share of all tokens of the map that is left after each block of `reduce_at`; default (0.5, 0.25, 0.0625),
            which are 98, 49 and 12 of 196 tokens. At least one token is left.
        reduce_at: Indices of the blocks that reduce tokens, as many as there are shares. By default the last blocks of
            the first third, two thirds and five sixths of the depth, which are 3, 7 and 9 of 12.

    Raises:
        ValueError: A share is out of its range or larger than the one before it, or there are not as many blocks as
            shares.
    """

    needs_class_token = True
    after = "block"

    def __init__(
        self,
        first: int,
        depth: int,
        keep: Sequence[float] = (0.5, 0.25, 0.0625),
        reduce_at: Sequence[int] | None = None,
    ):
        if reduce_at is None:
            reduce_at = [first + max((depth - first) * sixths // 6 - 1, 0) for sixths in (2, 4, 5)]
        shares = [keep] if isinstance(keep, int | float) else list(keep)
        for share in shares:
            check_share("keep", share)
        if len(shares) != len(reduce_at) or shares != sorted(shares, reverse=True):
            raise ValueError(f"keep must be a falling share for each of the blocks {list(reduce_at)}, not {shares}")
        # In a net of few blocks, several reductions may fall to one block: the last one counts.
        self.shares = dict(sorted(zip(map(int, reduce_at), shares, strict=True)))
        self.reduce_at = list(self.shares)

    def reduce(self, x: Tensor, attended: Attended, groups: Groups, number: int) -> Step:
        norms = attended.out[:, :, attended.extra :].norm(dim=-1)  # (B, heads, n)
        importance = norms / (norms.sum(1, keepdim=True) + 1e-8)
        scores = (attended.class_attention() * importance).sum(1)
        left = int(self.shares[self.reduce_at[number]] * groups.owner.shape[1])
        return keep_best(x, scores, min(max(left, 1), x.shape[1]))

    @staticmethod
    def arguments_for(left: float) -> dict[str, Any]:
        # The paper's shares are powers of its last one.
        return {"keep": [round(left**power, 4) for power in (0.25, 0.5, 1)]}
