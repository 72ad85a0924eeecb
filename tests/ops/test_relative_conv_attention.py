"""Relative attention equals its definition, on the whole map and in windows."""

import pytest
import torch

from ops import Place, create_op


@pytest.mark.parametrize("window", [None, 3])
def test_scores_have_the_kernel_value_of_the_offset_added(window):
    torch.manual_seed(0)
    H, W, heads, dim, size = 4, 6, 2, 8, 3
    op = create_op("relative_conv_attention", dim, heads, size=size, window=window).double()
    h, w = (H, W) if window is None else (window, window)
    table = op.relative_position_bias_table
    if window is None:
        table = torch.nn.functional.interpolate(table[None], (2 * h - 1, 2 * w - 1), mode="bilinear")[0]
    x = torch.randn(1, H, W, dim, dtype=torch.float64)
    rows = -(-H // h) * h
    padded = torch.zeros(1, rows, W, dim, dtype=torch.float64)
    padded[:, :H] = x
    q, k, v = op.qkv(padded)[0].unflatten(-1, (3, heads, -1)).unbind(2)
    expected = torch.zeros(H, W, dim, dtype=torch.float64)
    for i, j in ((i, j) for i in range(H) for j in range(W)):
        keys = [(a, b) for a in range(rows) for b in range(W) if (a // h, b // w) == (i // h, j // w)]
        mixed = []
        for n in range(heads):
            scores = [q[i, j, n] @ k[a, b, n] / 2 + table[n, a - i + h - 1, b - j + w - 1] for a, b in keys]
            weights = torch.stack(scores).softmax(0)
            mixed.append(sum(weight * v[a, b, n] for weight, (a, b) in zip(weights, keys, strict=True)))
        expected[i, j] = op.proj(torch.cat(mixed))
    assert torch.allclose(op(x)[0], expected, atol=1e-12)


def test_tables_belong_to_the_map_at_224_pixels_and_other_tables_are_interpolated():
    op = create_op("relative_conv_attention", 8, 2, place=Place(stride=32))
    assert op.relative_position_bias_table.shape == (2, 13, 13)
    flat = torch.arange(27 * 27.0).view(-1, 1).expand(-1, 2)
    # The author's offsets are from key to query, so the first row is the last one here.
    assert op.resize_table("relative_position_bias_table", flat)[0, 0, 0] > 27 * 26
    assert create_op("relative_conv_attention", 8, 2, size=0).relative_position_bias_table is None
