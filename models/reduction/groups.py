"""Groups of tokens: which token stands for which tokens of the map after tokens were merged or dropped."""

from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """Outcome of one reduction of the tokens (B, n, C) of a map.

    Attributes:
        tokens: The tokens that are left, (B, m, C).
        targets: Index of the token that each of the n tokens became, -1 for a dropped one, (B, n) int64.
        sources: Index of one of the n tokens for each that is left, (B, m) int64.
    """

    tokens: Tensor
    targets: Tensor
    sources: Tensor


class Groups(NamedTuple):
    """Partition of a map's N tokens into n groups, each with one token, and dropped tokens.

    Attributes:
        owner: Index of the group of each token of the map, -1 for a dropped one, (B, N) int64.
        home: Index of one token of the map for each group, (B, n) int64.
    """

    owner: Tensor
    home: Tensor

    @classmethod
    def of_one(cls, x: Tensor) -> "Groups":
        """Return the groups before any reduction, of one token each, for a map's tokens (B, N, C)."""
        indices = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        return cls(indices, indices)

    @property
    def all_of_one(self) -> bool:
        """True if no token was merged or dropped."""
        return self.owner.shape[1] == self.home.shape[1]

    def counts(self) -> Tensor:
        """Return the number of tokens in each group, (B, n) float32, if none was dropped."""
        ones = torch.ones(self.owner.shape, device=self.owner.device)
        return torch.zeros(self.home.shape, device=self.home.device).scatter_add(1, self.owner, ones)

    def after(self, step: Step) -> "Groups":
        """Return the groups after one more reduction."""
        owner = step.targets.gather(1, self.owner.clamp(min=0)).masked_fill(self.owner < 0, -1)
        return Groups(owner, self.home.gather(1, step.sources))

    def select(self, x: Tensor) -> Tensor:
        """Return one token of each group, (B, n, C), from the whole map's tokens (B, N, C)."""
        return take(x, self.home)

    def restore(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """Return the tokens of the whole map (B, N, C): each is the token of its group.

        Args:
            x: The groups' tokens (B, n, C).
            before: Earlier tokens of the whole map (B, N, C), whose values dropped tokens keep. None if none was
                dropped.
        """
        whole = take(x, self.owner.clamp(min=0))
        return whole if before is None else torch.where((self.owner >= 0).unsqueeze(-1), whole, before)


class ForwardPass:
    """Values of the current forward pass that a net's blocks share; a copy of a net starts without them.

    Attributes:
        whole: Blocks return all tokens of the map, for `forward_intermediates`.
        groups: Groups of the tokens that a block receives, by the block's index. An index has its own entry, since
            gradient checkpointing runs the blocks a second time in reverse order.
    """

    def __init__(self):
        self.whole = False
        self.groups: dict[int, Groups] = {}

    def __reduce__(self) -> tuple[type, tuple]:
        # Tensors that are part of a graph can be neither copied nor saved.
        return ForwardPass, ()


def take(x: Tensor, indices: Tensor) -> Tensor:
    """Return the tokens (B, m, C) at `indices` (B, m) of tokens (B, n, C)."""
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def keep_best(x: Tensor, scores: Tensor, number: int) -> Step:
    """Keep the tokens with the highest scores, in descending order, and drop the others.

    Args:
        x: Tokens (B, n, C).
        scores: Score of each token, (B, n).
        number: Number of tokens that are left, at most n.
    """
    kept = scores.topk(number, dim=1).indices
    places = torch.arange(number, device=x.device).expand_as(kept)
    return Step(take(x, kept), torch.full_like(scores, -1, dtype=torch.int64).scatter(1, kept, places), kept)
