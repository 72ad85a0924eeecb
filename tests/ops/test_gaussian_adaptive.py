"""Gaussian adaptive attention: its definition, uneven parts and short axes."""

import math

import pytest
import torch

from ops import create_op


def gaussian_adaptive(**arguments):
    torch.manual_seed(0)
    op = create_op("gaussian_adaptive", dim=8, num_heads=4, gaussians=3, **arguments).double()
    with torch.no_grad():
        for head in op.attention_heads:
            head.mean_offsets.normal_()
    return op


@pytest.mark.parametrize("axis", ["tokens", "channels"])
@torch.no_grad()
def test_weights_as_defined(axis):
    op = gaussian_adaptive(axis=axis)
    x = torch.randn(1, 3, 6, 8, dtype=torch.float64)
    lines = x[0].flatten(0, 1).T if axis == "tokens" else x[0].flatten(0, 1)
    out = torch.empty_like(lines)
    for line, result in zip(lines, out, strict=True):
        part = len(line) // 4
        for i, head in enumerate(op.attention_heads):
            end = len(line) if i == 3 else (i + 1) * part
            values = line[i * part : end]
            variance = ((values - values.mean()) ** 2).sum() / (len(values) - 1) + 1e-8
            weights = []
            for value in values:
                weight = 1.0
                for offset, c in zip(head.mean_offsets, head.c, strict=True):
                    y = (value - values.mean() - offset) / variance.sqrt()
                    weight = weight * (-(y**2) / (2 * c**2)).exp() / (2 * math.pi * c**2).sqrt()
                weights.append(weight)
            result[i * part : end] = values * torch.stack(weights) / max(sum(weights), torch.tensor(1e-8))
    expected = (out.T if axis == "tokens" else out).unflatten(0, (3, 6))[None]
    assert torch.allclose(op(x), expected, atol=1e-12)


def test_a_map_with_fewer_tokens_than_heads_is_kept():
    x = torch.randn(1, 1, 3, 8, dtype=torch.float64)
    assert torch.equal(gaussian_adaptive()(x), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"axis": "rows"}, "axis must be 'tokens' or 'channels', not 'rows'"), ({"gaussians": 0}, "at least 1, not 0")],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_op("gaussian_adaptive", dim=8, num_heads=4, **arguments)
