"""Blocks of papers of which only the op is ours: composed as their authors do, for the reference vectors of the blocks.

Maps are (B, C, H, W), as in the authors' code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ops import create_op


@dataclass(frozen=True)
class Block:
    """A block that is built from the `kwargs` of its vector.

    Attributes:
        make: builds the block from `kwargs`.
    """

    make: Any

    def build(self, vector: Mapping[str, Any]) -> nn.Module:
        """Build the block."""
        return self.make(**vector["kwargs"])

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the block's output."""
        return (model(x),)


class ConvFFN(nn.Module):
    """CATANet's MLP, with a 5 x 5 depthwise convolution that is added to the hidden map."""

    renames = ((r"^dwconv\.depthwise_conv\.0\.", "dwconv."),)

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + F.gelu(self.dwconv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))


class TokenAggregationBlock(nn.Module):
    """CATANet's block of op `content_aggregation`."""

    renames = ((r"^mlp\.norm\.", "mlp_norm."), (r"^mlp\.fn\.", "mlp."), (r"^(?!norm|mlp|mixer)", "mixer."))

    def __init__(
        self, dim: int, heads: int, qk_dim: int, mlp_dim: int, n_iter: int, num_tokens: int, group_size: int,
        initted: bool,
    ):  # fmt: skip
        super().__init__()
        self.norm, self.mlp_norm, self.mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), ConvFFN(dim, mlp_dim)
        self.mixer = create_op(
            "content_aggregation", dim, heads, qk_dim=qk_dim, steps=n_iter, centers=num_tokens, group=group_size
        )
        self.mixer.centers.initted.fill_(initted)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.mixer(self.norm(x))
        return (x + self.mlp(self.mlp_norm(x))).permute(0, 3, 1, 2)
