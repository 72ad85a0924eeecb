"""Cross-shaped window attention equals its definition, written as loops."""

import pytest
import torch

from ops import Place, create_op
from retinue.utils.arithmetic import round_up


def token_at(t, row: int, column: int):
    """Return a token of a map (H, W, C), or zeros beyond its edge."""
    on_map = 0 <= row < t.shape[0] and 0 <= column < t.shape[1]
    return t[row, column] if on_map else t.new_zeros(t.shape[-1])


@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("size", [(6, 9), (5, 7), (1, 2)], ids=str)
def test_attends_as_defined(size, heads):
    """Compute each token's attention to its strip; padded tokens, half on each side, are attended to."""
    torch.manual_seed(0)
    split, head_dim = 3, 2
    op = create_op("cross_shaped_window", dim=heads * head_dim, num_heads=heads, split=split).double()
    x = torch.randn(1, *size, heads * head_dim, dtype=torch.float64)
    qkv = op.qkv(x)[0]
    pads = [(round_up(side, split) - side) // 2 for side in size]
    out = torch.zeros_like(x)
    for head in range(heads):
        # Direction 0 has vertical strips, which cut the columns; direction 1 has horizontal ones
        direction = int(head >= op.heads[0])
        axis, lepe = 1 - direction, op.lepe[direction]
        channels = slice(head * head_dim, (head + 1) * head_dim)
        q, k, v = (t[..., channels] for t in qkv.chunk(3, -1))
        first = head - direction * op.heads[0]
        weight, bias = (p[first * head_dim : (first + 1) * head_dim] for p in (lepe.weight, lepe.bias))
        for i in range(size[0]):
            for j in range(size[1]):
                start = (((i, j)[axis] + pads[axis]) // split) * split - pads[axis]
                across, along = range(start, start + split), range(size[direction])
                keys = [(m, n) if axis == 0 else (n, m) for m in across for n in along]
                strip_k, strip_v = (torch.stack([token_at(t, a, b) for a, b in keys]) for t in (k, v))
                mixed = (strip_k @ q[i, j] / head_dim**0.5).softmax(0) @ strip_v + bias
                for a, b in keys:
                    if abs(a - i) <= 1 and abs(b - j) <= 1:
                        mixed = mixed + weight[:, 0, a - i + 1, b - j + 1] * token_at(v, a, b)
                out[0, i, j, channels] = mixed
    assert torch.allclose(op(x), op.proj(out), atol=1e-12)


def test_strips_widen_by_stage_to_the_whole_map():
    places = [Place(stage) for stage in range(4)]
    assert [create_op("cross_shaped_window", 8, 2, place=place).split for place in places] == [1, 2, 7, 0]


def test_a_single_head_is_cut_in_two_directions():
    assert create_op("cross_shaped_window", 8, 1).heads == [1, 1]
    assert create_op("cross_shaped_window", 8, 1, split=0).heads == [1]
    with pytest.raises(ValueError, match="cannot share one head of 7 channels"):
        create_op("cross_shaped_window", 7, 1)
    with pytest.raises(ValueError, match="split must be at least 1, or 0 for the whole map, not -1"):
        create_op("cross_shaped_window", 8, 2, split=-1)
