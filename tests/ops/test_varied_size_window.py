"""Varied-size window attention equals its definition, query by query, with points in tokens of the map."""

import math

import pytest
import torch

from ops import create_op
from retinue.utils.arithmetic import ceil_div


def bilinear(t, x: float, y: float):
    """Interpolate a map (H, W, C) at a point between its tokens; the map is zero outside."""
    value = torch.zeros(t.shape[-1], dtype=t.dtype)
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < t.shape[0] and 0 <= j < t.shape[1]:
                value = value + (1 - abs(y - i)) * (1 - abs(x - j)) * t[i, j]
    return value


@pytest.mark.parametrize("size", [(6, 9), (7, 4), (2, 5)], ids=str)
def test_varied_size_window_attends_as_defined(size):
    torch.manual_seed(0)
    dim, window, (H, W) = 6, 3, size
    op = create_op("varied_size_window", dim=dim, num_heads=2, window=window).double()
    x = torch.randn(1, H, W, dim, dtype=torch.float64)
    rows, columns = ceil_div(H, window), ceil_div(W, window)
    q, k, v = op.qkv(x)[0].chunk(3, -1)

    out = torch.zeros_like(x)
    for i, j in ((i, j) for i in range(H) for j in range(W)):
        top, left = i // window * window, j // window * window
        # Padded tokens count in the mean
        mean = x[0, top : top + window, left : left + window].sum((0, 1)) / window**2
        mean = torch.where(mean > 0, mean, 0.01 * mean)
        offsets, scales = (layer(mean).tolist() for layer in (op.sampling_offsets, op.sampling_scales))
        heads = []
        for h in range(2):
            # The unit of offsets is half of the padded map, divided by the number of whole windows on the map
            move_x = offsets[2 * h] / max(W // window, 1) * (columns * window - 1) / 2
            move_y = offsets[2 * h + 1] / max(H // window, 1) * (rows * window - 1) / 2
            channels, scores, values = slice(3 * h, 3 * h + 3), [], []
            for a in range(window):
                for b in range(window):
                    centre = (window - 1) / 2
                    at_x = left + centre + (b - centre) * (1 + scales[2 * h]) + move_x
                    at_y = top + centre + (a - centre) * (1 + scales[2 * h + 1]) + move_y
                    row = (i - top - a + window - 1) * (2 * window - 1) + (j - left - b + window - 1)
                    score = q[i, j, channels] @ bilinear(k, at_x, at_y)[channels] / math.sqrt(3)
                    scores.append(score + op.relative_position_bias_table[row, h])
                    values.append(bilinear(v, at_x, at_y)[channels])
            heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        out[0, i, j] = op.proj(torch.cat(heads))
    assert torch.allclose(op(x), out, atol=1e-12)
