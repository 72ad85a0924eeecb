"""Token pruning of Sparsifiner (Wei et al., CVPR 2023, arXiv:2303.13755), without its sparse attention.

Paper: Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers. Written after the
paper and the authors' repository, lim142857/Sparsifiner (MIT). In the authors' net, `models/backbones/sparsifiner.py`,
pruned tokens stay as zeros that no token attends to, since the predictors' tables belong to places of the map; here
they are removed.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

from torch import Tensor

from models.reduction.groups import Groups, Step, keep_best
from models.reduction.registry import Attended, Reduction, check_share, quarters, register_reduction


@register_reduction("sparsifiner")
class SparsifinerReduction(Reduction):
    """The tokens to which the class token pays the least attention are dropped after the block.

    Args:
        keep: Share of the tokens that is left after each block of `reduce_at`, relative to all tokens of the map: this
            number, its square, ...; default 0.7.
        reduce_at: Indices of the blocks that reduce tokens. By default those before a quarter, a half and three
            quarters of the depth, which are 3, 6 and 9 of 12.
    """

    needs_class_token = True
    after = "block"

    def __init__(self, first: int, depth: int, keep: float = 0.7, reduce_at: Sequence[int] | None = None):
        check_share("keep", keep)
        self.keep = keep
        self.reduce_at = [] if keep == 1 else quarters(first, depth) if reduce_at is None else sorted(set(reduce_at))

    def reduce(self, x: Tensor, attended: Attended, groups: Groups, number: int) -> Step:
        scores = attended.class_attention().mean(1)
        return keep_best(x, scores, ceil(self.keep ** (number + 1) * groups.owner.shape[1]))

    @staticmethod
    def arguments_for(left: float) -> dict[str, Any]:
        return {"keep": round(left ** (1 / 3), 4)}
