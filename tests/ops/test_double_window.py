"""Double window attention equals two window attentions, and its definition on ragged windows."""

import math

import pytest
import torch

from ops import create_op


@pytest.mark.parametrize("num_heads", [4, 3])
def test_each_half_is_window_attention_with_its_own_shift(num_heads):
    torch.manual_seed(0)
    op, dim = create_op("double_window", 4 * num_heads, num_heads, window=4), 4 * num_heads
    halves, start = [], 0
    for i, (heads, shift) in enumerate(zip(op.heads, (0, 2), strict=True)):
        window = create_op("window", 4 * heads, heads, window=4, shift=shift)
        rows = torch.cat([torch.arange(start, start + 4 * heads) + part * dim for part in range(3)])
        window.relative_position_bias_table.data = op.attn[i].relative_position_bias_table.data
        # Projections of the whole input to the channels of the half
        window.qkv.weight.data, window.qkv.bias.data = op.qkv.weight[rows], op.qkv.bias[rows]
        window.proj.weight.data, window.proj.bias.data = torch.eye(4 * heads), torch.zeros(4 * heads)
        halves.append(window)
        start += 4 * heads
    x = torch.randn(2, 8, 12, dim)
    assert torch.allclose(op(x), op.proj(torch.cat([half(x) for half in halves], -1)), atol=1e-6)


@pytest.mark.parametrize("size", [(5, 9), (4, 9), (2, 7), (6, 11)])
def test_tokens_attend_as_defined_on_ragged_windows(size):
    torch.manual_seed(0)
    side, shift = min(4, *size), 2 if min(size) > 4 else 0
    op = create_op("double_window", 8, 2, window=4).double()
    x = torch.randn(1, *size, 8, dtype=torch.float64)
    q, k, v = op.qkv(x)[0].chunk(3, -1)
    tokens = [(i, j) for i in range(size[0]) for j in range(size[1])]

    def window_of(token, s):
        return [((t - s) // side, t < s) for t in token]

    out = []
    for half, s in enumerate((0, shift)):
        part, table = slice(4 * half, 4 * half + 4), op.attn[half].relative_position_bias_table[:, 0]
        attended = torch.zeros(*size, 4, dtype=torch.float64)
        for i, j in tokens:
            keys = [t for t in tokens if window_of(t, s) == window_of((i, j), s)]
            scores = [
                q[i, j, part] @ k[a, b, part] / math.sqrt(4) + table[(i - a + 3) * 7 + j - b + 3] for a, b in keys
            ]
            attended[i, j] = torch.stack(scores).softmax(0) @ torch.stack([v[a, b, part] for a, b in keys])
        out.append(attended)
    assert torch.allclose(op(x)[0], op.proj(torch.cat(out, -1)), atol=1e-12)


def test_one_block_passes_information_across_windows():
    torch.manual_seed(0)
    op = create_op("double_window", 8, 2, window=4)
    x = torch.randn(1, 16, 16, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(op(x)[0, 5, 5].sum(), x)
    rows = gradient.abs().sum((0, 2, 3)).nonzero().flatten().tolist()
    # Windows 4 to 7 and, shifted, 2 to 5
    assert rows == list(range(2, 8))


def test_one_head_is_cut_in_two():
    assert create_op("double_window", 8, 1).heads == [1, 1]
    with pytest.raises(ValueError, match="two halves cannot share one head of 7 channels"):
        create_op("double_window", 7, 1)
