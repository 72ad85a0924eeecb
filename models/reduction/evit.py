"""EViT: Expediting Vision Transformers via Token Reorganizations (Liang et al., ICLR 2022, arXiv:2202.07800).

Paper: Not All Patches Are What You Need. Written after the paper and the authors' repository, youweiliang/evit
(Apache-2.0). Training begins with all tokens in the paper; here a net keeps its share from the start.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from models.reduction.groups import Groups, Step, keep_best
from models.reduction.registry import Attended, Reduction, check_share, quarters, register_reduction


@register_reduction("evit")
class EViTReduction(Reduction):
    """The tokens to which the class token pays the least attention are fused to one token, or dropped.

    Args:
        keep: Share of the map's tokens that each block of `reduce_at` keeps, above 0 and at most 1; default 0.7.
        fuse: Add the other tokens, weighted by the attention of the class token, as one more token; default true.
        reduce_at: Indices of the blocks that reduce tokens, between their attention and their MLP. By default those
            before a quarter, a half and three quarters of the depth, which are 3, 6 and 9 of 12.
    """

    needs_class_token = True

    def __init__(
        self, first: int, depth: int, keep: float = 0.7, fuse: bool = True, reduce_at: Sequence[int] | None = None
    ):
        check_share("keep", keep)
        self.keep, self.fuse = keep, fuse
        self.reduce_at = [] if keep == 1 else quarters(first, depth) if reduce_at is None else sorted(set(reduce_at))

    def reduce(self, x: Tensor, attended: Attended, groups: Groups, number: int) -> Step:
        return self.reorganize(x, attended.class_attention().mean(1))

    def reorganize(self, x: Tensor, scores: Tensor) -> Step:
        """Keep the tokens with the highest scores, in descending order, and append the fused token.

        Args:
            x: Tokens (B, n, C).
            scores: Attention of the class token to them, (B, n).
        """
        step = keep_best(x, scores, ceil(self.keep * x.shape[1]))
        number = step.tokens.shape[1]
        if not self.fuse or number == x.shape[1]:
            return step
        dropped = step.targets < 0
        weights = scores.masked_fill(~dropped, 0).to(x.dtype)
        return Step(
            torch.cat([step.tokens, weights.unsqueeze(1) @ x], dim=1),
            step.targets.masked_fill(dropped, number),
            torch.cat([step.sources, dropped.int().argmax(1, keepdim=True)], dim=1),
        )

    @staticmethod
    def arguments_for(left: float) -> dict[str, Any]:
        return {"keep": round(left ** (1 / 3), 4)}
