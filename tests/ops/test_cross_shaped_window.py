"""Cross-shaped windows, by definition."""

import pytest
import torch

from ops import Place, create_op


@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("size", [(6, 9), (5, 7), (1, 2)], ids=str)
def test_attends_as_defined(size, heads):
    """Each token against those of its strip, one by one; zeros of the padding, half on each side, count."""
    torch.manual_seed(0)
    split, d = 3, 2  # and d channels a head
    op = create_op("cross_shaped_window", dim=heads * d, num_heads=heads, split=split).double()
    x = torch.randn(1, *size, heads * d, dtype=torch.float64)
    qkv = op.qkv(x)[0]
    pads = [(-(-side // split) * split - side) // 2 for side in size]
    out = torch.zeros_like(x)
    for head in range(heads):
        direction = int(head >= op.heads[0])  # 0: vertical strips, which cut the columns
        axis, lepe = 1 - direction, op.lepe[direction]
        channels = slice(head * d, (head + 1) * d)
        q, k, v = (t[..., channels] for t in qkv.chunk(3, -1))
        first = head - direction * op.heads[0]
        weight, bias = (p[first * d : (first + 1) * d] for p in (lepe.weight, lepe.bias))
        for i in range(size[0]):
            for j in range(size[1]):
                start = (((i, j)[axis] + pads[axis]) // split) * split - pads[axis]
                across, along = range(start, start + split), range(size[direction])
                keys = [(m, n) if axis == 0 else (n, m) for m in across for n in along]
                real = [0 <= a < size[0] and 0 <= b < size[1] for a, b in keys]
                at = lambda t: torch.stack(  # noqa: E731
                    [t[a, b] if r else t.new_zeros(d) for (a, b), r in zip(keys, real, strict=True)]  # noqa: B023
                )
                mixed = (at(k) @ q[i, j] / d**0.5).softmax(0) @ at(v) + bias
                for (a, b), r in zip(keys, real, strict=True):
                    if r and abs(a - i) <= 1 and abs(b - j) <= 1:  # in the same strip
                        mixed = mixed + weight[:, 0, a - i + 1, b - j + 1] * v[a, b]
                out[0, i, j, channels] = mixed
    assert torch.allclose(op(x), op.proj(out), atol=1e-12)


def test_strips_widen_by_stage_to_the_whole_map():
    places = [Place(stage) for stage in range(4)]
    assert [create_op("cross_shaped_window", 8, 2, place=place).split for place in places] == [1, 2, 7, 0]


def test_a_single_head_looks_both_ways():
    assert create_op("cross_shaped_window", 8, 1).heads == [1, 1]
    assert create_op("cross_shaped_window", 8, 1, split=0).heads == [1]
    with pytest.raises(ValueError, match="cannot share one head of 7 channels"):
        create_op("cross_shaped_window", 7, 1)
    with pytest.raises(ValueError, match="split must be at least 1, or 0 for the whole map, not -1"):
        create_op("cross_shaped_window", 8, 2, split=-1)
