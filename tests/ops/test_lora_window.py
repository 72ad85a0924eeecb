"""Window attention with adapters: its definition, and linear layers with adapters."""

from typing import Any

import pytest
import torch

from ops import create_op
from ops.lora import LoRALinear


@pytest.mark.parametrize("size", [(4, 8), (5, 3)], ids=str)
@torch.no_grad()
def test_attends_as_defined(size):
    """Compute each window on the padded map, where zeros are keys too and no window is smaller than 4 x 4."""
    torch.manual_seed(0)
    op = create_op("lora_window", dim=6, num_heads=2, window=4, rank=2).double()
    H, W = size
    x = torch.randn(1, H, W, 6, dtype=torch.float64)
    padded = torch.zeros(1, 8, 8, 6, dtype=torch.float64)
    padded[:, :H, :W] = x
    q, k, v = op.qkv(padded)[0].chunk(3, -1)
    out = torch.zeros_like(x)
    for i, j in ((i, j) for i in range(H) for j in range(W)):
        top, left = i // 4 * 4, j // 4 * 4
        keys = [(a, b) for a in range(top, top + 4) for b in range(left, left + 4)]
        heads = []
        for h in range(2):
            part = slice(3 * h, 3 * h + 3)
            bias = [op.relative_position_bias_table[(i - a + 3) * 7 + j - b + 3, h] for a, b in keys]
            scores = torch.stack([q[i, j, part] @ k[a, b, part] / 3**0.5 for a, b in keys]) + torch.stack(bias)
            heads.append(scores.softmax(0) @ torch.stack([v[a, b, part] for a, b in keys]))
        out[0, i, j] = op.proj(torch.cat(heads))
    assert torch.allclose(op(x), out, atol=1e-12)


@torch.no_grad()
def test_an_adapter_adds_a_gated_and_a_full_term():
    torch.manual_seed(0)
    layer: Any = LoRALinear(5, 3, rank=2, alpha=6)
    x = torch.randn(4, 5)
    adapted = 3 * (x @ layer.lora_down.weight.T @ layer.lora_up.weight.T)
    expected = x @ layer.weight.T + layer.bias + x @ layer.lora_residual.weight.T
    expected += torch.sigmoid(x @ layer.lora_gate.weight.T) * adapted
    assert torch.allclose(layer(x), expected, atol=1e-6)
    layer.lora_up.weight.zero_()
    layer.lora_residual.weight.zero_()
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    plain: Any = LoRALinear(5, 3, rank=2, alpha=6, gated=False)
    merged = plain.weight + 3 * plain.lora_up.weight @ plain.lora_down.weight
    assert torch.allclose(plain(x), torch.nn.functional.linear(x, merged, plain.bias), atol=1e-6)


def test_freezing_leaves_the_adapters_to_train():
    op = create_op("lora_window", dim=6, num_heads=2, freeze=True)
    frozen = {name for name, parameter in op.named_parameters() if not parameter.requires_grad}
    assert frozen == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


def test_a_rank_of_0_is_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        create_op("lora_window", dim=6, num_heads=2, rank=0)
