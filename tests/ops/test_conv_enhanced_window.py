"""Convolution-enhanced window attention is the sum of window attention and a convolution."""

import pytest
import torch
from torch import nn

from ops import Place, create_op


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("depthwise", [False, True])
def test_is_window_attention_plus_a_convolution_of_each_tokens_neighbours(depthwise, block):
    torch.manual_seed(0)
    place = Place(block=block)
    op = create_op("conv_enhanced_window", 6, 2, place=place, window=4, depthwise=depthwise).double()
    window = create_op("window", 6, 2, place=place, window=4).double()
    window.load_state_dict(op.state_dict(), strict=False)
    x = torch.randn(1, 7, 9, 6, dtype=torch.float64)
    weight = op.local.weight
    if depthwise:
        weight = torch.diag_embed(weight[:, 0].permute(1, 2, 0)).permute(2, 3, 0, 1)
    local = torch.zeros_like(x)
    for i in range(7):
        for j in range(9):
            total = op.local.bias
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    if 0 <= i + di < 7 and 0 <= j + dj < 9:
                        total = total + weight[:, :, di + 1, dj + 1] @ x[0, i + di, j + dj]
            local[0, i, j] = nn.functional.gelu(total)
    assert torch.allclose(op(x), window(x) + local, atol=1e-12)


def test_without_its_convolution_it_is_window_attention():
    torch.manual_seed(0)
    op = create_op("conv_enhanced_window", 8, 2, place=Place(block=1), batch_norm=True)
    window = create_op("window", 8, 2, place=Place(block=1))
    window.load_state_dict(op.state_dict(), strict=False)
    nn.init.zeros_(op.local_norm.weight)
    x = torch.randn(2, 13, 9, 8)
    assert torch.equal(op(x), window(x))
