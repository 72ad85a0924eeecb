"""Hyena in two dimensions: its definition, and what each token sees."""

import math
from typing import Any

import pytest
import torch

from ops import Place, create_op
from ops.attention.hyena import long_convolution

DIRECTIONS = ("seq", "standard", "4dir", "4dirp", "parallel")


def hyena(**arguments) -> Any:
    torch.manual_seed(0)
    return create_op("hyena", dim=4, num_heads=1, filter_width=5, **arguments).double()


def convolve(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Compute the long convolution of (C, H, W) as loops."""
    H, W = x.shape[1:]
    out = torch.zeros_like(x)
    for i, j in ((i, j) for i in range(H) for j in range(W)):
        for a, b in ((a, b) for a in range(i + 1) for b in range(j + 1)):
            out[:, i, j] += kernel[:, a, b] * x[:, i - a, j - b]
    return out / (2 * math.sqrt(H * W))


@pytest.mark.parametrize("block", [0, 1])
@torch.no_grad()
def test_convolves_and_multiplies_as_defined(block):
    op = hyena(size=4, order=3, place=Place(block=block))
    x = torch.randn(1, 4, 5, 4, dtype=torch.float64)
    u = op.short_filter(op.in_proj(x).permute(0, 3, 1, 2))[0]
    x0, x1, x2, v = u.split(4)
    filters = op.filter((4, 5))
    v = v * x2
    if block == 0:
        v = convolve(v.flip(1, 2), filters[:4]).flip(1, 2) + op.skip[:4, None, None] * v
    else:
        v = convolve(v, filters[:4]) + op.skip[:4, None, None] * v
    v = v * x1
    v = convolve(v, filters[4:]) + op.skip[4:, None, None] * v
    expected = op.out_proj((v * x0).permute(1, 2, 0))
    assert torch.allclose(op(x)[0], expected, atol=1e-12)


@pytest.mark.parametrize("window", ["standard", "learn", "symmetric", "no"])
@pytest.mark.parametrize("kind", ["joint", "product"])
@torch.no_grad()
def test_filters_as_defined(kind, window):
    if (kind, window) == ("product", "symmetric"):
        return
    op = hyena(size=6, filter=kind, window=window).filter
    features = op.features(6)
    assert torch.allclose(features[:, 0], torch.linspace(0, 1, 6, dtype=torch.float64))

    def network(net, z):
        for layer in net[:-1]:
            z = torch.sin(op.freq[0] * layer(z))
        return net[-1](z)

    falls = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, 4, dtype=torch.float64).abs()
    filters = op((6, 6))
    for a, b in ((a, b) for a in range(6) for b in range(6)):
        rows, columns = (-a / 5 * falls).exp(), (-b / 5 * falls).exp()
        if kind == "product":
            if window == "learn":
                rows, columns = rows + op.x_shift[0, 0], columns + op.y_shift[0, 0]
            value = network(op.nets[0], features[a]) * network(op.nets[1], features[b])
            expected = value if window == "no" else value * rows * columns
        else:
            value = network(op.nets[0], torch.cat([features[a], features[b]]))
            fall = (-(a + b) * falls).exp() if window == "symmetric" else rows * columns
            shift = op.shift[0, 0] if window in ("learn", "symmetric") else 0
            expected = value if window == "no" else value * (fall + shift)
        assert torch.allclose(filters[:, a, b], expected, atol=1e-7)


def test_a_filter_of_one_tap_scales_the_map():
    x, tap = torch.randn(2, 3, 4, 6), torch.zeros(3, 4, 6)
    tap[:, 0, 0] = 2 * math.sqrt(24)
    assert torch.allclose(long_convolution(x, tap, torch.zeros(3)), x, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_a_token_sees(direction):
    for block in (0, 1):
        op = hyena(direction=direction, size=7, place=Place(block=block))
        x = torch.randn(1, 7, 9, 4, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(op(x)[0, 3, 4].sum(), x)
        seen = grad[0].abs().sum(-1) > 1e-9
        # The short convolution reaches one token further.
        above, below = seen[:2, :3], seen[5:, 6:]
        everything = direction in ("4dir", "4dirp")
        flipped = direction == "seq" and block == 0
        assert above.all() == (everything or not flipped) and below.all() == (everything or flipped)
        assert everything or not (below if not flipped else above).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": 1}, "order must be at least 2"),
        ({"direction": "sequential"}, "direction must be one of seq, standard"),
        ({"filter": "product", "window": "symmetric"}, "needs filter 'joint'"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        hyena(**arguments)
