"""Plain window attention equals its definition, written as loops."""

import torch
import torch.nn.functional as F

from ops import create_op


def test_tokens_attend_to_their_window_without_positions():
    torch.manual_seed(0)
    op = create_op("plain_window", dim=8, num_heads=2, window=3).double()
    x = torch.randn(1, 5, 6, 8, dtype=torch.float64)
    # Padded tokens are attended to
    q, k, v = op.qkv(F.pad(x, (0, 0, 0, 0, 0, 1)))[0].chunk(3, -1)
    out = torch.zeros_like(x)
    for i in range(5):
        for j in range(6):
            window = (slice(i // 3 * 3, i // 3 * 3 + 3), slice(j // 3 * 3, j // 3 * 3 + 3))
            heads = [
                (k[window][..., h].flatten(0, 1) @ q[i, j, h] / 2).softmax(0) @ v[window][..., h].flatten(0, 1)
                for h in (slice(0, 4), slice(4, 8))
            ]
            out[0, i, j] = op.proj(torch.cat(heads))
    assert torch.allclose(op(x), out, atol=1e-12)
