"""HyperZ.Z.W: its definition and what it reads of maps that are not square."""

from typing import Any

import pytest
import torch

from ops import create_op
from ops.attention.hyper_zzw import standardize


def hyper_zzw(**arguments: Any) -> Any:
    torch.manual_seed(0)
    arguments = {"size": 4} | arguments
    return create_op("hyper_zzw", dim=3, num_heads=1, hidden=5, **arguments).double()


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (5, 3)], ids=str)
@torch.no_grad()
def test_multiplies_planes_as_defined(size):
    op = hyper_zzw()
    H, W = size
    x = torch.randn(2, H, W, 3, dtype=torch.float64)
    kernel = op.slow(size)[0].permute(1, 2, 0)
    fast = op.fast(x)
    fast = (fast - fast.mean((1, 2), keepdim=True)) / (fast.var((1, 2), correction=0, keepdim=True) + 1e-5).sqrt()
    out = torch.zeros_like(x)
    for i, j, k in ((i, j, k) for i in range(H) for j in range(W) for k in range(min(H, W))):
        out[:, i, j] += x[:, i, k] * kernel[i, k] * fast[:, k, j]
    assert torch.allclose(op(x), out, atol=1e-12)


@torch.no_grad()
def test_the_slow_network_is_a_chain_of_sines():
    slow = hyper_zzw().slow
    slow.bias_p.normal_()
    for a, b in ((a, b) for a in range(4) for b in range(4)):
        place = torch.tensor([-1 + 2 * a / 3, -1 + 2 * b / 3], dtype=torch.float64)
        waves = [torch.sin(f["linear"].weight[:, :, 0, 0] @ place) for f in slow.filters]
        x = waves[0]
        for layer, wave in zip(slow.linears, waves[1:], strict=True):
            x = wave * (layer.weight[:, :, 0, 0] @ x + layer.bias) + slow.bias_p[0, 0, a, b]
        expected = slow.output_linear.weight[:, :, 0, 0] @ x
        assert torch.allclose(slow()[0, :, a, b], expected, atol=1e-7)


def test_standardization_over_the_batch():
    x = torch.randn(4, 2, 3, 5)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    assert torch.allclose(standardize(x, over_batch=True), expected, atol=1e-5)


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match="omega above 0, not 4, 5, 2 and 0"):
        hyper_zzw(omega=0)
