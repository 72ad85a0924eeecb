"""Auxiliary losses: how an op or a net hands losses of its forward pass to the training, such as a load balance."""

import torch
from torch import Tensor, nn


class Losses:
    """Auxiliary losses of one forward pass, which the ops of a net add by name.

    A net creates one object for each forward pass and passes it down as the argument `losses`, so nothing stays on a
    module. This class is not a mapping: sharding (FSDP) copies the mappings among a module's inputs, and what is added
    to a copy would be lost.

    Args:
        target: Final tokens of a teacher, (B, N, C), that the net's own are compared with; None for no such loss.
        token_labels: Soft labels of the map's tokens, (B, N, K), for nets with a classifier of tokens; None for no such
            loss.
        wants_attention: Whether the net's last op is asked for the attention of its class token.

    Attributes:
        attention: Attention of the class token to the map's tokens in the last op, (B, N), the mean over the heads and
            without gradient; None if it was not asked for.
    """

    def __init__(self, target: Tensor | None = None, token_labels: Tensor | None = None, wants_attention: bool = False):
        self.target, self.token_labels, self.wants_attention = target, token_labels, wants_attention
        self.values: dict[str, list[Tensor]] = {}
        self.attention: Tensor | None = None

    def add(self, name: str, *values: Tensor) -> None:
        """Add scalars to the loss `name`."""
        self.values.setdefault(name, []).extend(values)

    def means(self) -> dict[str, Tensor]:
        """Return each loss by name, a scalar: the mean over the ops that have added to it, as in the papers."""
        return {name: torch.stack(values).mean() for name, values in self.values.items()}


def loss_weights(module: nn.Module) -> dict[str, float]:
    """Return the papers' weights of a module's auxiliary losses by name, its submodules' included.

    A module with losses has an attribute `loss_weights`, pairs of a name and a weight, and its forward pass an argument
    `losses`.
    """
    weights: dict[str, float] = {}
    for part in module.modules():
        weights |= dict(getattr(part, "loss_weights", ()))
    return weights
