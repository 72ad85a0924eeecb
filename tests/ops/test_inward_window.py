"""Inward windows hold the same number of keys for every token, and are full attention where they cover the map."""

import math

import pytest
import torch

from ops import Place, create_op


def keys_of(position, n, reach):
    """Return the keys of a query on a side of n tokens: what the border cuts off is added on the other end."""
    first = position - reach - max(0, reach + position - n + 1)
    last = position + reach + max(0, reach - position)
    return [key for key in range(n) if first <= key <= last]


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("size", [(9, 6), (8, 1), (3, 7)])
def test_tokens_attend_as_defined(size, extra):
    torch.manual_seed(0)
    op = create_op("inward_window", 8, 2, window=(5, 3), temperature=1.3, qk_norm=True).double()
    x, tokens = torch.randn(1, *size, 8, dtype=torch.float64), torch.randn(1, extra, 8, dtype=torch.float64)
    q, k, v = (t[0].unflatten(-1, (2, -1)) for t in op.project(x))
    extra_q, extra_k, extra_v = (t[0].unflatten(-1, (2, -1)) for t in op.project(tokens))

    def attend(query, positions):
        keys = torch.stack([*(k[p] for p in positions), *extra_k])
        values = torch.stack([*(v[p] for p in positions), *extra_v])
        weights = ((keys * query).sum(-1) * 1.3 / math.sqrt(4)).softmax(0)
        return op.proj((weights.unsqueeze(-1) * values).sum(0).flatten())

    out, extra_out = op(x, tokens)
    for i in range(size[0]):
        for j in range(size[1]):
            rows, columns = keys_of(i, size[0], 2), keys_of(j, size[1], 1)
            assert len(rows) == min(5, size[0]) and len(columns) == min(3, size[1])
            expected = attend(q[i, j], [(a, b) for a in rows for b in columns])
            assert torch.allclose(out[0, i, j], expected, atol=1e-12)
    everything = [(a, b) for a in range(size[0]) for b in range(size[1])]
    for query, result in zip(extra_q, extra_out[0], strict=True):
        assert torch.allclose(result, attend(query, everything), atol=1e-12)


def test_maps_of_the_training_size_have_full_attention_with_the_same_weights():
    torch.manual_seed(0)
    place = Place(stride=32, extra=1)
    op, full = create_op("inward_window", 8, 2, place=place), create_op("full", 8, 2, place=place)
    op.load_state_dict(full.state_dict())
    for size in [(7, 7), (5, 6)]:
        x, extra = torch.randn(2, *size, 8), torch.randn(2, 1, 8)
        assert torch.allclose(op(x), full(x), atol=1e-6)
        assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(op(x, extra), full(x, extra), strict=True))
    assert not torch.allclose(op(x := torch.randn(1, 9, 9, 8)), full(x), atol=1e-3)


def test_the_default_window_is_the_training_grid_rounded_up_to_odd():
    assert create_op("inward_window", 8, 2, place=Place(stride=16)).window == (15, 15)
    assert create_op("inward_window", 8, 2, train_size=(30, 51)).window == (31, 51)


def test_larger_maps_keep_the_neighborhood_ops_attention():
    torch.manual_seed(0)
    op, neighborhood = create_op("inward_window", 8, 2, window=5), create_op("neighborhood", 8, 2, kernel=5, bias=False)
    op.load_state_dict(neighborhood.state_dict())
    x = torch.randn(1, 9, 7, 8)
    assert torch.allclose(op(x), neighborhood(x), atol=1e-6)


def test_the_entropy_temperature_counts_keys():
    op = create_op("inward_window", 8, 2, train_size=14, temperature="entropy")
    assert op.factor(577, 1) == pytest.approx(1.097, abs=1e-3)
    assert op.factor(197, 1) == 1.0
    small = create_op("inward_window", 8, 2, train_size=14, window=7, temperature="entropy")
    assert small.factor(49, 0) == pytest.approx(0.859, abs=1e-3)
    with pytest.raises(ValueError, match="temperature must be a number above 0 or 'entropy', not 'entropic'"):
        create_op("inward_window", 8, 2, temperature="entropic")
