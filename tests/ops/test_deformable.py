"""Deformable attention in plain PyTorch equals its definition, written as loops."""

from itertools import accumulate, product

import torch
from torch import Tensor

from ops.deformable import deformable_attention

SHAPES = [(4, 5), (2, 3)]


def by_definition(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Interpolate each sample bilinearly between the four tokens around it; values outside the map are zero."""
    B, Q, heads, levels, points, _ = locations.shape
    starts = [0, *accumulate(h * w for h, w in shapes)]
    out = []
    for b, q, head in product(range(B), range(Q), range(heads)):
        total = value.new_zeros(value.shape[-1])
        for level, point in product(range(levels), range(points)):
            h, w = shapes[level]
            x, y = locations[b, q, head, level, point] * torch.tensor([w, h]) - 0.5
            for i, j in product((int(y.floor()), int(y.floor()) + 1), (int(x.floor()), int(x.floor()) + 1)):
                if 0 <= i < h and 0 <= j < w:
                    share = (1 - (y - i).abs()) * (1 - (x - j).abs()) * weights[b, q, head, level, point]
                    total = total + share * value[b, starts[level] + i * w + j, head]
        out.append(total)
    return torch.stack(out).view(B, Q, -1)


def test_samples_and_gradients_are_as_defined():
    torch.manual_seed(0)
    value, weights = torch.randn(2, 26, 2, 3).double(), torch.rand(2, 4, 2, 2, 3).double()
    locations = 1.2 * torch.rand(2, 4, 2, 2, 3, 2).double() - 0.1
    inputs = [t.requires_grad_() for t in (value, locations, weights)]
    out = deformable_attention(value, torch.tensor(SHAPES), locations, weights)
    expected = by_definition(value, SHAPES, locations, weights)
    assert torch.allclose(out, expected)
    dout = torch.randn_like(out)
    gradients, expected_gradients = (torch.autograd.grad(y, inputs, dout) for y in (out, expected))
    assert all(torch.allclose(*pair) for pair in zip(gradients, expected_gradients, strict=True))
    half = deformable_attention(value.bfloat16(), torch.tensor(SHAPES), locations.float(), weights.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.allclose(half.double(), out, atol=0.1)
