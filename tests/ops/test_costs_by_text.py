"""Ops by their papers' text, without a vector: parameters and multiply-accumulates follow the papers' formulas."""

import pytest
from torch import Tensor, nn

from models import complexity
from ops import create_op

# Channels, heads, side of a window, height and width of the map, and number of tokens
C, HEADS, WINDOW, H, W = 24, 3, 4, 8, 16
N = H * W
# Ratio of reduction and channels of queries and keys per head, of strip self-attention
RATIO, QK = 2, 1
# Number of reduced tokens: of strip self-attention, and of multi-scale fusion with ⌈8 / √2⌉ x ⌈16 / √2⌉ of them
M, K = N // RATIO**2, 6 * 12

WINDOWS = 4 * N * C**2 + 2 * N * WINDOW**2 * C
# Name and arguments of the op, weights (tables included, biases and norms not), multiply-accumulates
COSTS = {
    "CoSwin": (
        "conv_enhanced_window",
        {"window": WINDOW},
        4 * C**2 + (2 * WINDOW - 1) ** 2 * HEADS + 9 * C**2,
        WINDOWS + 9 * N * C**2,
    ),
    "MAFormer": (
        "multi_scale_fusion",
        {"window": WINDOW, "size": (H, W), "separable": False},
        8 * C**2 + N * K + K * C + (2 * WINDOW - 1) ** 2 * HEADS,
        WINDOWS + 2 * (N + K) * C**2 + 3 * N * K * C,
    ),
    "S2AFormer": (
        "strip_self",
        {"ratio": RATIO, "qk_dim": QK},
        2 * C * HEADS * QK + 2 * C**2 + RATIO**2 * C**2,
        (N * M + (N + M) * C) * (HEADS * QK + C) + RATIO**2 * M * C**2,
    ),
}


class OnMaps(nn.Module):
    """An op on maps (B, C, H, W)."""

    def __init__(self, op: nn.Module):
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x.permute(0, 2, 3, 1))


@pytest.mark.parametrize("paper", COSTS)
def test_weights_and_macs_are_those_of_the_formulas(paper):
    name, arguments, weights, macs = COSTS[paper]
    op = create_op(name, C, HEADS, **arguments)
    assert sum(parameter.numel() for parameter in op.parameters() if parameter.ndim > 1) == weights
    assert complexity(OnMaps(op).eval(), (H, W), in_chans=C)[1] == macs
