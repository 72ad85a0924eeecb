"""Registry of token reductions: what a reduction must provide, and how it is found by name and built.

A reduction merges or drops tokens of a ViT-shaped net between its blocks or inside them; it has no weights. To add one,
write a subclass of `Reduction` in a file of `models/reduction/`, decorated with `@register_reduction("<name>")`. The
command line, `--help` and `scripts/compare_reduction.py` find it by themselves, and so do the tests. The first line of
the class docstring says how tokens become fewer; the file's docstring names the paper.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from models.reduction.groups import Groups, Step
from retinue.utils.registry import Registry, Spec

# Name in place of a reduction's: the net keeps all tokens.
NONE = "none"


class Attended(NamedTuple):
    """Attention of a block, from which a reduction chooses tokens.

    Attributes:
        q: Queries (B, heads, E + n, D) of E extra tokens and n tokens of the map.
        k: Keys (B, heads, E + n, D).
        out: Outputs of the heads before the projection, (B, heads, E + n, D).
        scale: Factor on the products of queries and keys.
        extra: Number of extra tokens E.
    """

    q: Tensor
    k: Tensor
    out: Tensor
    scale: float
    extra: int

    def class_attention(self) -> Tensor:
        """Return the attention of the class token, which is the first token, to the tokens of the map, (B, heads, n).

        The softmax is over all tokens, so a row's sum is below 1.
        """
        scores = self.q[:, :, :1] * self.scale @ self.k.transpose(-2, -1)
        return scores.softmax(-1)[:, :, 0, self.extra :]


class Reduction:
    """Base of the reductions.

    Args:
        first: Index of the first block that can reduce tokens.
        depth: Number of blocks of the net.
        kwargs: Arguments of the reduction, each with a default.

    Attributes:
        needs_class_token: Whether the net must have a class token.
        after: Where in a block tokens are reduced: after the "attention", that is before the MLP, or after the "block".
        proportional: A token counts in the attention as often as there are tokens in its group.
        restores: The last block gives all tokens of the map back, each with the values of its group's token. So means
            over the map weight a token by the size of its group.
        reduce_at: Indices of the blocks that reduce tokens, ascending.
    """

    needs_class_token = False
    after = "attention"
    proportional = False
    restores = False
    reduce_at: Sequence[int]

    def reduce(self, x: Tensor, attended: Attended, groups: Groups, number: int) -> Step:
        """Reduce tokens (B, n, C) of a map in the block `reduce_at[number]`."""
        raise NotImplementedError

    @staticmethod
    def arguments_for(left: float) -> dict[str, Any]:
        """Return the arguments with which about the share `left` of the map's tokens is left after the last block."""
        raise NotImplementedError


_REDUCTIONS: Registry[type[Reduction]] = Registry("reduction", ("first", "depth"), absence=NONE)
register_reduction, list_reductions, find_reduction = _REDUCTIONS.register, _REDUCTIONS.names, _REDUCTIONS.find


def create_reduction(spec: Spec, first: int, depth: int) -> Reduction:
    """Build a reduction.

    Args:
        spec: Name of the reduction, or a mapping of `name` and arguments.
        first: Index of the first block that can reduce tokens.
        depth: Number of blocks of the net.

    Raises:
        ValueError: The name or an argument is unknown, or a value is out of its range.

    Example:
        `create_reduction({"name": "tome", "r": 8}, first=0, depth=12)`
    """
    cls: Any
    cls, arguments = _REDUCTIONS.resolve(spec)
    return cls(first, depth, **arguments)


def check_share(name: str, share: float) -> None:
    """Raise a ValueError if the argument `name` of a reduction is not a share above 0 and at most 1."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"{name} must be a share of the tokens above 0 and at most 1, not {share}")


def quarters(first: int, depth: int) -> list[int]:
    """Return the blocks before a quarter, a half and three quarters of the blocks from `first` on: 3, 6, 9 of 12."""
    return [first + (depth - first) * i // 4 for i in (1, 2, 3)]
