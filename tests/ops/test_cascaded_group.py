"""Cascaded group attention equals its definition on maps that windows do not fit, or that are shorter than one."""

import math

import pytest
import torch
import torch.nn.functional as F

from ops import create_op


@pytest.mark.parametrize("size", [(3, 9), (6, 2)], ids=str)
def test_heads_attend_as_defined(size):
    """Compute each window and head in turn; windows shrink to the map's sides, and padded tokens are attended to."""
    torch.manual_seed(0)
    op = create_op("cascaded_group", dim=6, num_heads=3, window=4, key_dim=3, kernels=(5, 3)).double()
    torch.nn.init.normal_(op.attention_biases)
    assert [conv.kernel_size for conv in op.dws] == [(5, 5), (3, 3), (3, 3)]
    h, w = (min(4, side) for side in size)
    x = torch.randn(1, *size, 6, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, -size[1] % w, 0, -size[0] % h))
    out = torch.zeros_like(padded)
    tokens = [(i, j) for i in range(h) for j in range(w)]
    for top in range(0, padded.shape[1], h):
        for left in range(0, padded.shape[2], w):
            window, head_out, outs = padded[0, top : top + h, left : left + w], 0, []
            for head, part in enumerate(window.chunk(3, dim=-1)):
                q, k, v = op.qkvs[head](part + head_out).split((3, 3, 2), dim=-1)
                q = op.dws[head](q.permute(2, 0, 1)).permute(1, 2, 0)
                head_out = torch.zeros_like(part)
                for i, j in tokens:
                    bias = torch.stack([op.attention_biases[head, 4 * abs(i - a) + abs(j - b)] for a, b in tokens])
                    weights = (k.flatten(0, 1) @ q[i, j] / math.sqrt(3) + bias).softmax(0)
                    head_out[i, j] = weights @ v.flatten(0, 1)
                outs.append(head_out)
            out[0, top : top + h, left : left + w] = op.proj(torch.cat(outs, dim=-1).relu())
    assert torch.allclose(op(x), out[:, : size[0], : size[1]], atol=1e-12)
