from functools import partial

import pytest
import torch

from ops.functional import gathered_attention
from scripts import benchmark_ops

SMALL = partial(benchmark_ops.op_step, batch=1, side=14, dim=32, topk=3)


@pytest.mark.parametrize("name", benchmark_ops.FORMULATIONS)
def test_every_formulation_means_the_same(name):
    for train in (False, True):
        for ours, theirs in zip(SMALL(name, train)(), SMALL(benchmark_ops.GATHER, train)(), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6) and ours.abs().sum() > 0


def test_rows_hold_both_sides_and_directions():
    rows = benchmark_ops.compare(SMALL, "masked SDPA", benchmark_ops.GATHER, rounds=1, shape="small", memory=False)
    assert [(row["what"], row["direction"]) for row in rows] == [
        ("masked SDPA", "forward"),
        (benchmark_ops.GATHER, "forward"),
        ("masked SDPA", "forward + backward"),
        (benchmark_ops.GATHER, "forward + backward"),
    ]
    assert rows[0]["against"] == benchmark_ops.GATHER and isinstance(rows[0]["ratio"], float)


def test_no_figure_comes_of_formulations_that_differ(monkeypatch):
    def wrong(q, k, v, index, grid, num_heads, scale):
        return gathered_attention(q, k, v, index, grid, num_heads, 1.001 * scale)

    monkeypatch.setitem(benchmark_ops.FORMULATIONS, "wrong", wrong)
    with pytest.raises(ValueError, match=r"wrong and .* differ by .* in tensor 0 \(forward, small\)"):
        benchmark_ops.compare(SMALL, "wrong", benchmark_ops.GATHER, rounds=1, shape="small", memory=False)


def test_a_second_net_follows_the_routes_of_the_first():
    routes, seen = [], []
    q = torch.zeros(1)

    def attention(q, k, v, index, *rest):
        seen.append(index)
        return q

    for call in ("first", "second"):
        follow = benchmark_ops.following(attention, routes)
        for layer in range(2):
            follow(q, q, q, f"{call} {layer}")
    assert seen == ["first 0", "first 1"] * 2
