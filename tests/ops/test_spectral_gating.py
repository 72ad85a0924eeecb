"""Spectral gating is a filter that wraps around the map, and keeps its response to each frequency at other sizes."""

import math

import pytest
import torch

from ops import create_op
from ops.attention.spectral_gating import resize_filter


def test_is_a_circular_convolution():
    torch.manual_seed(0)
    op = create_op("spectral_gating", 3, 1, size=(4, 6)).double()
    torch.nn.init.normal_(op.complex_weight)
    x, impulse = torch.randn(1, 4, 6, 3, dtype=torch.float64), torch.zeros(1, 4, 6, 3, dtype=torch.float64)
    impulse[:, 0, 0] = 1
    response = op(impulse)[0]
    out = torch.zeros_like(x)
    for i in range(4):
        for j in range(6):
            for a in range(4):
                for b in range(6):
                    out[0, i, j] += response[(i - a) % 4, (j - b) % 6] * x[0, a, b]
    assert torch.allclose(op(x), out, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (8, 12), (7, 5)], ids=str)
def test_a_response_that_is_linear_in_frequency_keeps_its_values(size):
    """Such a response has no error of interpolation."""
    rows, columns = torch.fft.fftfreq(4).abs(), torch.fft.rfftfreq(6)
    weight = torch.stack([rows[:, None] + 2 * columns, rows[:, None] - columns], dim=-1)[:, :, None]
    new_rows, new_columns = torch.fft.fftfreq(size[0]).abs(), torch.fft.rfftfreq(size[1])
    expected = torch.stack([new_rows[:, None] + 2 * new_columns, new_rows[:, None] - new_columns], dim=-1)
    assert torch.allclose(resize_filter(weight, (4, 6), size)[:, :, 0], expected, atol=1e-6)


def test_a_mean_is_multiplied_by_the_weight_of_frequency_zero():
    torch.manual_seed(0)
    op = create_op("spectral_gating", 2, 1, size=(4, 6))
    for size in ((4, 6), (5, 9)):
        out = op(torch.full((1, *size, 2), math.pi))
        assert torch.allclose(out, (math.pi * op.complex_weight[0, 0, :, 0]).expand_as(out), atol=1e-5)


def test_weights_in_channels_last_memory_are_the_same_filter():
    torch.manual_seed(0)
    op = create_op("spectral_gating", 3, 1, size=(4, 6))
    x = torch.randn(2, 4, 6, 3)
    expected = op(x)
    assert torch.equal(op.to(memory_format=torch.channels_last)(x), expected)
