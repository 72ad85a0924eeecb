"""Registry of token reductions: what a reduction must provide, and how it is found by name and built.

A reduction merges or drops tokens of a ViT-shaped net between its blocks or inside them; it has no weights. To add one,
write a subclass of `Reduction` in a file of `models/reduction/`, decorated with `@register_reduction("<name>")`. The
command line, `--help` and `scripts/compare_reduction.py` find it by themselves, and so do the tests. The first line of
the class docstring says how tokens become fewer; the file's docstring names the paper.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from models.reduction.groups import Groups, Step
from retinue.utils.suggestions import nearest

# Name of a reduction, or a mapping of `name` and arguments.
Spec = str | Mapping[str, Any]
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


Class = TypeVar("Class", bound=type[Reduction])
_REDUCTIONS: dict[str, type[Reduction]] = {}
# Parameters of a reduction that the net sets, not the user.
GIVEN = ("first", "depth")


def register_reduction(name: str) -> Callable[[Class], Class]:
    """Return a class decorator that makes a reduction available under `name`.

    Raises:
        ValueError: `name` is already taken.
    """

    def add(cls: Class) -> Class:
        if name in (*_REDUCTIONS, NONE):
            raise ValueError(f"reduction {name!r} is registered twice")
        _REDUCTIONS[name] = cls
        return cls

    return add


def list_reductions() -> list[str]:
    """Return the names of all reductions, sorted; `none` is left out."""
    return sorted(_REDUCTIONS)


def find_reduction(name: Any) -> type[Reduction]:
    """Return the class of a reduction.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in _REDUCTIONS:
        names = [*list_reductions(), NONE]
        raise ValueError(f"no reduction is called {name!r}.{nearest(str(name), names)} There are: {', '.join(names)}")
    return _REDUCTIONS[name]


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
    if not isinstance(spec, str) and not (isinstance(spec, Mapping) and "name" in spec):
        raise ValueError(f"reduction must be a name or a mapping with a 'name', not {spec!r}")
    name = spec if isinstance(spec, str) else spec["name"]
    arguments = {} if isinstance(spec, str) else {key: value for key, value in spec.items() if key != "name"}
    cls: Any = find_reduction(name)
    parameters = [parameter for parameter in inspect.signature(cls).parameters if parameter not in GIVEN]
    for argument in arguments:
        if argument not in parameters:
            suggestion = nearest(argument, parameters)
            raise ValueError(f"reduction {name!r} takes no {argument!r}.{suggestion} It takes: {', '.join(parameters)}")
    return cls(first, depth, **arguments)


def check_share(name: str, share: float) -> None:
    """Raise a ValueError if the argument `name` of a reduction is not a share above 0 and at most 1."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"{name} must be a share of the tokens above 0 and at most 1, not {share}")


def quarters(first: int, depth: int) -> list[int]:
    """Return the blocks before a quarter, a half and three quarters of the blocks from `first` on: 3, 6, 9 of 12."""
    return [first + (depth - first) * i // 4 for i in (1, 2, 3)]
