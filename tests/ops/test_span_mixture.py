"""Mixture of spans: sizes of the neighbourhoods, and the cases in which it equals other ops."""

import itertools

import pytest
import torch

from ops import blocks, create_op

X = torch.randn(2, 6, 9, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EXTRA = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def span_mixture(**arguments):
    torch.manual_seed(0)
    return create_op("span_mixture", dim=16, num_heads=4, **arguments).double()


def with_weights_of(op, name, **arguments):
    other = create_op(name, dim=16, num_heads=4, **arguments).double()
    other.load_state_dict(op.state_dict())
    return other


def test_sizes_grow_with_the_map_and_are_odd_or_the_whole_side():
    op = span_mixture()
    assert [op.kernel(rule, (56, 20)) for rule in op.plan] == [(3, 3), (7, 7), (15, 5), (56, 20)]
    assert [op.kernel(rule, (2, 14)) for rule in op.plan] == [(2, 3), (2, 7), (1, 3), (2, 14)]
    assert op.kernel((-20, 0.5), (14, 56)) == (1, 9)


@pytest.mark.parametrize(("heads", "expected"), [(1, [2]), (2, [1, 3]), (3, [0, 2, 3]), (8, [0, 0, 1, 1, 2, 2, 3, 3])])
def test_heads_share_the_default_plan(heads, expected):
    op = create_op("span_mixture", dim=48 if heads == 3 else 16, num_heads=heads)
    default = [(3, 0), (7, 0), (0, 0.25), (0, 1)]
    assert [default.index(rule) for rule in op.plan] == expected


def test_equal_rules_give_the_neighborhood_op_and_whole_sides_full_attention():
    op = span_mixture(plan=[(3, 0)])
    assert torch.allclose(op(X), with_weights_of(op, "neighborhood", kernel=3, bias=False)(X), atol=1e-12)
    op = span_mixture(plan=[(0, 1)])
    assert torch.allclose(op(X), with_weights_of(op, "full")(X), atol=1e-12)
    for ours, full in zip(op(X, EXTRA), with_weights_of(op, "full")(X, EXTRA), strict=True):
        assert torch.allclose(ours, full, atol=1e-12)


def test_each_head_has_its_own_neighborhood_and_all_see_sinks():
    op = span_mixture(plan=[(3, 0), (0, 1), (3, 0), (0, 0.5)], anchors=2)
    out, _ = op(X, EXTRA)
    q, k, v = (t.unflatten(-1, (4, 4)) for t in op.qkv(X).chunk(3, dim=-1))
    extra_k, extra_v = (t.unflatten(-1, (4, 4)) for t in op.qkv(EXTRA).chunk(3, dim=-1)[1:])
    expected = torch.zeros_like(q)
    sizes = [(3, 3), (6, 9), (3, 3), (3, 5)]
    areas = [(slice(y, y + 3), slice(x, x + 5)) for y, x in itertools.product((0, 3), (0, 4))]
    for b, y, x, h in itertools.product(range(2), range(6), range(9), range(4)):
        top, left = (min(max(p - n // 2, 0), side - n) for p, n, side in zip((y, x), sizes[h], (6, 9), strict=True))
        near = (b, slice(top, top + sizes[h][0]), slice(left, left + sizes[h][1]), h)
        keys, values = (
            torch.cat([t[near].flatten(0, 1), e[b, :, h], torch.stack([t[b, *a, h].mean((0, 1)) for a in areas])])
            for t, e in ((k, extra_k), (v, extra_v))
        )
        expected[b, y, x, h] = (keys @ q[b, y, x, h] / 2).softmax(0) @ values
    assert torch.allclose(out, op.proj(expected.flatten(3)), atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_bands_are_as_defined(monkeypatch, causal):
    monkeypatch.setattr(blocks, "MAX_MASKED_TOKENS", 0)
    op = span_mixture(mode="band", block=5, plan=[(5, 0), (-30, 0.2), (0, 0.25), (12, 0.1)], causal=causal)
    # Widths in blocks of the 54 tokens; the second rule gives -6 + 2.16, which is raised to 1
    widths = [1, 1, 2, 3]
    q, k, v = (t.flatten(1, 2).unflatten(-1, (4, 4)) for t in op.qkv(X).chunk(3, dim=-1))
    expected = torch.zeros_like(q)
    for i, h in itertools.product(range(54), range(4)):
        blocks_of = [(i // 5, j // 5) for j in range(54)]
        keys = [j for j, (a, b) in enumerate(blocks_of) if abs(a - b) < widths[h] or a == 0 or b == 0]
        keys = [j for j in keys if j <= i or not causal]
        scores = torch.einsum("bd,bkd->bk", q[:, i, h], k[:, keys, h]) / 2
        expected[:, i, h] = torch.einsum("bk,bkd->bd", scores.softmax(-1), v[:, keys, h])
    assert torch.allclose(op(X).flatten(1, 2), op.proj(expected.flatten(2)), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "bands"}, "mode must be one of neighborhood, band, not 'bands'"),
        ({"plan": [(3, 0)] * 3}, "plan must hold pairs"),
        ({"plan": [(3,)]}, "plan must hold pairs"),
        ({"anchors": -1}, "block must be at least 1 and anchors at least 0"),
        ({"causal": True}, "causal is for mode='band' without anchors only"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        span_mixture(**arguments)
