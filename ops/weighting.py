"""Marks of an op's values and of their weighted sums, for ops in which no layer returns the one or reads the other.

Views of attention (`retinue.evaluation.sight`) hold all else fixed and differentiate the sums by the values.
"""

from torch import Tensor, nn


class Values(nn.Module):
    """Identity on the values that an op weights, (B, ..., tokens, C).

    Args:
        by_head: The values are (B, heads, N, C / heads) for the N tokens that the op mixes.
    """

    def __init__(self, by_head: bool = False):
        super().__init__()
        self.by_head = by_head

    def forward(self, values: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Return the values.

        Args:
            values: The values.
            tokens: The map (B, H, W, C) of which the values are rearranged copies, or tokens (B, ..., tokens, C) for
                which the values stand. None if each value is a function of one token of the op's input.
        """
        return values


class WeightedSums(nn.Module):
    """Identity on the weighted sums of an op's values, (B, ..., tokens, C), with the channels of a head side by side.

    Args:
        by_channel: Each channel has weights of its own, of which views show the mean.
    """

    def __init__(self, by_channel: bool = False):
        super().__init__()
        self.by_channel = by_channel

    def forward(self, sums: Tensor) -> Tensor:
        return sums
