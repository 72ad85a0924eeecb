"""L2ViT's linear attention equals its definition, written as loops."""

import torch

from ops import create_op


def test_weights_are_rectified_products_over_their_sum():
    """Compute each query's weights, on a map so small that their sums are raised to 100 and on a larger one."""
    torch.manual_seed(0)
    op = create_op("enhanced_linear", dim=4, num_heads=2).double()
    sums_above_minimum = set()
    for size, factor in (((3, 2), 1), ((9, 8), 10)):
        x = factor * torch.randn(1, *size, 4, dtype=torch.float64)
        q, k, v = op.qkv(x)[0].flatten(0, 1).chunk(3, -1)
        out = torch.zeros_like(q)
        for token in range(len(q)):
            for head, part in enumerate((slice(0, 2), slice(2, 4))):
                weights = k[:, part].clamp(min=0) @ q[token, part].clamp(min=0)
                sums_above_minimum.add(bool(weights.sum() > 100))
                out[token, part] = op.temperature[head, 0] * (weights @ v[:, part]) / max(weights.sum(), 100)
        assert torch.allclose(op(x)[0].flatten(0, 1), op.proj(out), atol=1e-12)
    assert sums_above_minimum == {True, False}
