"""Circular local attention equals its definition, token by token, on maps of any size and with extra tokens."""

import math

import pytest
import torch

from ops import create_op


def defined(op, x, extra, radius, pool):
    """Compute the op for each token alone."""
    (H, W), heads = x.shape[1:3], op.num_heads
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in op.qkv(x)[0].chunk(3, -1))
    extra_q, extra_k, extra_v = (t.unflatten(-1, (heads, -1)) for t in op.qkv(extra)[0].chunk(3, -1))
    tokens = [(y, x) for y in range(H) for x in range(W)]
    cells = []
    for top in range(0, H, pool or H) if pool else ():
        for left in range(0, W, pool):
            members = [(y, x) for y, x in tokens if top <= y < top + pool and left <= x < left + pool]
            scale = pool**2 / len(members)
            weights = [scale * op.spatial_weight[y - top, x - left] for y, x in members]
            cells.append([sum(w * t[member] for w, member in zip(weights, members, strict=True)) for t in (k, v)])

    def attend(query, keys):
        scores = torch.stack([(query * key).sum(-1) for key, _ in keys]) / math.sqrt(query.shape[-1])
        return (scores.softmax(0).unsqueeze(-1) * torch.stack([value for _, value in keys])).sum(0).flatten()

    others = list(zip(extra_k, extra_v, strict=True))
    out = torch.zeros_like(x[0])
    for a, b in tokens:
        near = [(k[t], v[t]) for t in tokens if (t[0] - a) ** 2 + (t[1] - b) ** 2 < radius**2]
        out[a, b] = op.proj(attend(q[a, b], near + cells + others))
    everything = [(k[t], v[t]) for t in tokens] + others
    return out, [op.proj(attend(query, everything)) for query in extra_q]


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize(
    ("size", "radius", "pool"), [((7, 10), 3, None), ((7, 10), 2, 4), ((1, 5), 2, 3), ((4, 4), 9, 2)]
)
def test_tokens_attend_to_a_circle_and_to_the_cells(size, radius, pool, extra):
    torch.manual_seed(0)
    op = create_op("circular_local", dim=8, num_heads=2, radius=radius, pool=pool).double()
    if pool:
        op.spatial_weight.data.normal_()
    x, tokens = torch.randn(1, *size, 8, dtype=torch.float64), torch.randn(1, extra, 8, dtype=torch.float64)
    expected, expected_extra = defined(op, x, tokens, radius, pool)
    out, out_extra = op(x, tokens)
    assert torch.allclose(out[0], expected, atol=1e-12)
    assert all(torch.allclose(*pair, atol=1e-12) for pair in zip(out_extra[0], expected_extra, strict=True))


@pytest.mark.parametrize(("radius", "keys"), [(4, 45), (8, 193)])
def test_a_circle_holds_as_many_tokens_as_in_the_paper(radius, keys):
    torch.manual_seed(0)
    op = create_op("circular_local", dim=4, num_heads=1, radius=radius)
    x = torch.randn(1, 2 * radius + 3, 2 * radius + 1, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(op(x)[0, radius, radius].sum(), x)
    assert (gradient.abs().sum(-1) > 0).sum() == keys


def test_a_circle_around_the_whole_map_is_full_attention():
    torch.manual_seed(0)
    op, full = create_op("circular_local", 8, 2, radius=20), create_op("full", 8, 2)
    full.load_state_dict(op.state_dict())
    x, extra = torch.randn(2, 9, 11, 8), torch.randn(2, 1, 8)
    for out, expected in zip(op(x, extra), full(x, extra), strict=True):
        assert torch.allclose(out, expected, atol=1e-6)
