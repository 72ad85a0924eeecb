"""Overlapping cross-attention equals its definition, and window attention without an overlap."""

import math

import pytest
import torch
import torch.nn.functional as F

from ops import Place, create_op


@pytest.mark.parametrize("size", [(8, 12), (5, 9), (3, 6)])
def test_windows_attend_to_the_larger_windows_around_them(size):
    torch.manual_seed(0)
    op = create_op("overlapping_cross", 8, 2, window=4, overlap=0.5).double()
    x = torch.randn(1, *size, 8, dtype=torch.float64)
    q, k, v = op.qkv(x)[0].unflatten(-1, (3, 2, 4)).unbind(-3)
    side = [min(4, n) for n in size]
    out = torch.zeros_like(x[0])
    for i in range(size[0]):
        for j in range(size[1]):
            top, left = i // side[0] * side[0], j // side[1] * side[1]
            keys, values, bias = [], [], []
            for a in range(top - 1, top + side[0] + 1):
                for b in range(left - 1, left + side[1] + 1):
                    inside = 0 <= a < size[0] and 0 <= b < size[1]
                    keys.append(k[a, b] if inside else torch.zeros_like(k[0, 0]))
                    values.append(v[a, b] if inside else torch.zeros_like(v[0, 0]))
                    # The authors' index: key and query count from the start of their own windows
                    dy, dx = (a - top + 1) - (i - top), (b - left + 1) - (j - left)
                    bias.append(op.relative_position_bias_table[(dy - 1) * 9 + dx - 1])
            scores = (torch.stack(keys) * q[i, j]).sum(-1) / math.sqrt(4) + torch.stack(bias)
            out[i, j] = op.proj((scores.softmax(0).unsqueeze(-1) * torch.stack(values)).sum(0).flatten())
    assert torch.allclose(op(x)[0], out, atol=1e-12)


@pytest.mark.parametrize("block", [0, 1])
def test_without_an_overlap_it_is_window_attention(block):
    torch.manual_seed(0)
    place = Place(block=block)
    op = create_op("overlapping_cross", 8, 2, window=4, overlap=0, place=place)
    window = create_op("window", 8, 2, window=4, place=place)
    window.load_state_dict(op.state_dict())
    for size in [(8, 12), (4, 8), (2, 3)]:
        x = torch.randn(2, *size, 8)
        assert torch.allclose(op(x), window(x), atol=1e-6)


def test_the_branch_is_added_with_its_factor():
    torch.manual_seed(0)
    op = create_op("overlapping_cross", 12, 2, window=4, channel=0.5)
    plain = create_op("overlapping_cross", 12, 2, window=4)
    plain.load_state_dict({name: value for name, value in op.state_dict().items() if "branch" not in name})
    x = torch.randn(2, 5, 6, 12)
    first, _, second = op.branch.convs
    out = second(F.gelu(first(x.permute(0, 3, 1, 2))))
    gate = op.branch.gate(out.mean((2, 3), keepdim=True))
    assert torch.allclose(op(x), plain(x) + 0.5 * (out * gate).permute(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 7, "overlap": 0.5}, r"must be even after rounding down, not 7 \* 0.5 = 3"),
        ({"shift": 4}, "shift must be from 0 to window - 1, and 0 if windows overlap, not 4"),
        ({"squeeze": 0}, "compress and squeeze must be at least 1, not 3 and 0"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_op("overlapping_cross", 8, 2, **arguments)


def test_a_window_of_7_may_overlap_by_four_sevenths():
    assert create_op("overlapping_cross", 8, 2, window=7, overlap=4 / 7).halo == 2
