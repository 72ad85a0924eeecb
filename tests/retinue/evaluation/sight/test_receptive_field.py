"""Effective receptive fields of layers whose fields are known."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ops import create_op
from retinue.evaluation.sight.receptive_field import contributions, covered_area

SIDE = 21


class Net(nn.Module):
    """A net of one layer on the pixels, with 4 channels."""

    def __init__(self, layer: Any, channels_last: bool = False):
        super().__init__()
        self.layer = layer
        self.output_fmt = "NHWC" if channels_last else "NCHW"

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1) if self.output_fmt == "NHWC" else x)


def field(net: Net) -> np.ndarray:
    torch.manual_seed(0)
    return contributions(net.eval(), torch.rand(3, 4, SIDE, SIDE), "layer")


def same_scores(op: Any) -> Any:
    """Give all scores of an op the value 0, and let it average the values."""
    with torch.no_grad():
        op.qkv.weight.zero_()
        op.qkv.weight[8:] = torch.eye(4)
        op.qkv.bias.zero_()
        op.proj.weight.copy_(torch.eye(4))
        op.proj.bias.zero_()
        if hasattr(op, "relative_position_bias_table"):
            op.relative_position_bias_table.zero_()
    return op


def test_a_convolution_sees_its_kernel():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    nn.init.constant_(conv.weight, 0.5)
    found = field(Net(conv))
    expected = np.zeros((SIDE, SIDE))
    expected[9:12, 9:12] = found[10, 10]
    np.testing.assert_allclose(found, expected)
    assert found[10, 10] == pytest.approx(3 * 4 * 4 * 0.5)
    # One pixel of nine has 11 %.
    assert covered_area(found, (0.1, 0.2, 0.99)) == {0.1: 1 / 441, 0.2: 9 / 441, 0.99: 9 / 441}


def test_a_window_sees_its_window_and_full_attention_everything():
    found = field(Net(same_scores(create_op("window", 4, 1, window=7, shift=0)), channels_last=True))
    assert np.argwhere(found > 0).tolist() == [[y, x] for y in range(7, 14) for x in range(7, 14)]
    found = field(Net(same_scores(create_op("full", 4, 1)), channels_last=True))
    np.testing.assert_allclose(found, found[0, 0], rtol=1e-5)
    # Equal contributions: a square of side s holds s² / 441 of them, and s is odd.
    assert covered_area(found) == {0.2: 121 / 441, 0.3: 169 / 441, 0.5: 225 / 441, 0.99: 1.0}


def test_a_wide_image_and_no_contribution():
    found = np.zeros((4, 10))
    found[2, 5], found[0, 0] = 3, 1
    assert covered_area(found, (0.75, 0.99)) == {0.75: 1 / 40, 0.99: 1.0}
    with pytest.raises(ValueError, match="no pixel contributes"):
        covered_area(np.zeros((4, 4)))
