"""HiLo attention equals its definition, written as loops."""

import pytest
import torch

from ops import create_op
from retinue.utils.arithmetic import round_up


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1)], ids=str)
def test_attends_as_defined(size):
    """Compute high-frequency heads on a window's tokens and low-frequency heads on the means, which count padding."""
    torch.manual_seed(0)
    heads, head_dim, side = 3, 2, 2
    op = create_op("hilo", dim=heads * head_dim, num_heads=heads, window=side).double()
    assert (op.high_heads, op.low_heads) == (1, 2)
    x = torch.randn(1, *size, heads * head_dim, dtype=torch.float64)
    H, W = (round_up(n, side) for n in size)
    padded = x.new_zeros(H, W, heads * head_dim)
    padded[: size[0], : size[1]] = x[0]
    windows = [padded[i : i + side, j : j + side].flatten(0, 1) for i in range(0, H, side) for j in range(0, W, side)]
    k_low, v_low = op.low_kv(torch.stack([window.mean(0) for window in windows])).chunk(2, -1)
    out = torch.zeros_like(x)
    for i in range(size[0]):
        for j in range(size[1]):
            _, k, v = op.high_qkv(windows[i // side * (W // side) + j // side]).chunk(3, -1)
            q = op.high_qkv(x[0, i, j])[:head_dim]
            high = (k @ q / head_dim**0.5).softmax(0) @ v
            low = []
            for h in (slice(0, head_dim), slice(head_dim, 2 * head_dim)):
                low.append((k_low[:, h] @ op.low_q(x[0, i, j])[h] / head_dim**0.5).softmax(0) @ v_low[:, h])
            out[0, i, j] = torch.cat([op.high_proj(high), op.low_proj(torch.cat(low))])
    assert torch.allclose(op(x), out, atol=1e-12)


def test_heads_are_divided_as_in_the_paper():
    assert [create_op("hilo", 24, heads).low_heads for heads in (1, 2, 12)] == [1, 1, 10]
    # A window of one token is full attention
    assert create_op("hilo", 24, 12, window=1).high_heads == 0
    with pytest.raises(ValueError, match=r"alpha in \(0, 1\], not 2 and 0"):
        create_op("hilo", 24, 12, alpha=0)
