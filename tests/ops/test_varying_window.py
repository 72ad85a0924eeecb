"""Varying window attention equals its definition, token by token."""

import math

import pytest
import torch
import torch.nn.functional as F

from ops import Place, create_op


def extended(n, ratio):
    """Return the positions of a side of n tokens that is extended by copies, by the slices of the authors' code."""
    window, positions = n // 8, list(range(n))
    middle = (ratio + 1) * window // 2
    return positions[middle : ratio * window] + positions + positions[-ratio * window : -middle]


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_windows_attend_to_their_contexts(ratio):
    torch.manual_seed(0)
    (H, W), dim = (15, 7), 8
    op = create_op("varying_window", dim, 2, ratio=ratio).double()
    for parameter in op.parameters():
        parameter.data.normal_(std=0.3)
    x = torch.randn(1, H, W, dim, dtype=torch.float64)
    # Whole windows of 2 x 1 tokens
    padded = torch.stack([torch.stack([x[0, min(i, H - 1), min(j, W - 1)] for j in range(8)]) for i in range(16)])
    before, after = ratio // 2 - 1, ratio // 2
    scaled = F.relu(op.scale[0](F.pad(padded.permute(2, 0, 1), (before, after, before, after))))
    rows, columns = extended(16, ratio), extended(8, ratio)
    for i, j in [(0, 0), (1, 3), (7, 6), (14, 5), (9, 2)]:
        window = i // 2, j
        context = []
        for row in range(2):
            cells = [
                scaled[:, rows[window[0] * 2 + row * ratio + a], columns[window[1] + b]]
                for a in range(ratio)
                for b in range(ratio)
            ]
            context.append(torch.cat(cells))
        context = torch.stack(context)
        q, k, v = (t.unflatten(-1, (2, 4)) for t in (op.attn.q(padded[i, j]), op.attn.k(context), op.attn.v(context)))
        weights = ((k * q).sum(-1) / math.sqrt(4)).softmax(0)
        expected = op.attn.proj((weights.unsqueeze(-1) * v).sum(0).flatten())
        assert torch.allclose(op(x)[0, i, j], expected, atol=1e-12)


def test_blocks_take_the_ratios_in_turn():
    assert [create_op("varying_window", 8, 2, place=Place(block=block)).ratio for block in range(4)] == [2, 4, 8, 2]
    with pytest.raises(ValueError, match="ratio must be 2, 4 or 8, not 3"):
        create_op("varying_window", 8, 2, ratio=3)
