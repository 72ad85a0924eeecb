"""The pages docs/ops.md and docs/gates.md follow from the code: `python scripts/describe_ops.py` writes them."""

import pytest

from ops import list_gates, list_ops
from retinue.benchmarks.op_properties import cost_exponent, count_macs, reach
from retinue.results.ops_overview import GATES_OVERVIEW, OVERVIEW, gates_overview, overview
from scripts import describe_ops


def test_the_page_follows_from_the_ops():
    page = overview()
    assert OVERVIEW.read_text(encoding="utf-8") == page, "run python scripts/describe_ops.py"
    assert [f"| `{name}` |" in page for name in list_ops()] == [True] * len(list_ops())


def test_the_page_of_gates_follows_from_the_gates():
    page = gates_overview()
    assert GATES_OVERVIEW.read_text(encoding="utf-8") == page, "run python scripts/describe_ops.py"
    assert all(f"| `{name}` |" in page for name in list_gates())


@pytest.mark.parametrize(
    ("op", "exponent", "tokens"),
    [
        ("full", 2, (784, 28, 28)),
        ("window", 1, (49, 7, 7)),
        ({"name": "window", "window": 4}, 1, (16, 4, 4)),
        ({"name": "gated_conv", "kernel": 3}, 1, (9, 3, 3)),
        # Strips of 7 over the whole map: 7 x 28 tokens of each direction, 7 x 7 in common
        ({"name": "cross_shaped_window", "split": 7}, 1.5, (343, 28, 28)),
    ],
    ids=str,
)
def test_growth_and_reach_of_known_ops(op, exponent, tokens):
    assert cost_exponent(op) == pytest.approx(exponent, abs=0.05)
    assert reach(op) == tokens


def test_macs_of_a_known_op():
    """Count 4 products of N x C x C, and 2 of N x 49 x C, in windows that fit the map."""
    N, C = 56 * 56, 96
    assert count_macs("window", 56, C, 3) == N * (4 * C * C + 2 * 49 * C)


def test_an_unknown_op_is_not_timed():
    with pytest.raises(ValueError, match=r"no op is called 'windo'\. Did you mean 'window'"):
        describe_ops.main(["measure=windo"])
