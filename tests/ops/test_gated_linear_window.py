"""Gated linear attention and windows with sinks against matrices of weights, and special cases."""

import pytest
import torch
import torch.nn.functional as F

from ops import Place, create_op

TOKENS = [(i, j) for i in range(5) for j in range(4)]


def build(**arguments):
    """Return an op of 2 heads with random weights in float64, and a map of 5 x 4 tokens."""
    torch.manual_seed(0)
    op = create_op("gated_linear_window", 6, 2, **arguments).double()
    for parameter in op.parameters():
        torch.nn.init.normal_(parameter)
    return op, torch.randn(1, 5, 4, 6, dtype=torch.float64)


def define_linear(op, x, q, k, v, h):
    """Return the linear attention of head h by a matrix; q, k and v are (20, 3) in raster order."""
    log_gate = F.logsigmoid(op.gate(x))[0, ..., h].flatten()
    by_columns = op.order == "columns" or (op.order == "both" and h == 1)
    order = sorted(range(20), key=lambda t: TOKENS[t][::-1] if by_columns else TOKENS[t])
    q, k, v = q[order], k[order], v[order]
    features = [
        torch.cat([(t @ weight[h]).softmax(-1), (-t @ weight[h]).softmax(-1)], dim=-1)
        for t, weight in ((q, op.q_features), (k, op.k_features))
    ]
    total = log_gate[order].cumsum(0)
    before = total - log_gate[order]
    earlier, later = total[:, None] - total, before - before[:, None]
    decay = torch.where(torch.ones(20, 20).tril() > 0, earlier, later).exp()
    weights = features[0] @ features[1].T * decay
    out = torch.zeros_like(v)
    out[order] = weights @ v / weights.sum(-1, keepdim=True)
    return out


def define_window(op, q, k, v, h):
    """Return the window attention of head h token by token."""
    out, side = torch.zeros_like(v), op.window
    for t, (i, j) in enumerate(TOKENS):
        seen = [s for s, (a, b) in enumerate(TOKENS) if (a // side, b // side) == (i // side, j // side)]
        scores = (k[seen] @ q[t] * 3**-0.5).exp()
        sinks = op.sinks[h].exp().sum() if op.sinks is not None else 0
        out[t] = scores @ v[seen] / (scores.sum() + sinks)
    return out


@pytest.mark.parametrize(
    "arguments",
    [
        {"window": 3, "order": "rows", "features": 5},
        {"window": 3, "order": "columns", "sinks": 1},
        {"window": 2, "order": "both", "sinks": 0},
        {"window": 0, "order": "both"},
        {"window": 3, "gated": False},
    ],
    ids=str,
)
def test_attends_as_defined(arguments):
    op, x = build(**arguments)
    q, k, v = (t.flatten(1, 2)[0].unflatten(-1, (2, 3)).transpose(0, 1) for t in op.qkv(x).chunk(3, dim=-1))
    out = torch.zeros_like(v)
    for h in range(2):
        if op.gated:
            out[h] += define_linear(op, x, q[h], k[h], v[h], h)
        if op.window:
            out[h] += op.window_weight[h] * define_window(op, q[h], k[h], v[h], h)
    expected = op.proj(out.transpose(0, 1).flatten(1)).view_as(x)
    assert torch.allclose(op(x), expected, atol=1e-10)


def test_open_gates_give_linear_attention_in_any_order():
    op, x = build(window=0, order="rows")
    torch.nn.init.zeros_(op.gate.weight)
    torch.nn.init.constant_(op.gate.bias, 100.0)
    rows = op(x)
    permuted = x.flatten(1, 2)[:, torch.randperm(20)]
    order = torch.argsort(permuted[0, :, 0]), torch.argsort(x.flatten(1, 2)[0, :, 0])
    assert torch.allclose(op(permuted.view_as(x)).flatten(1, 2)[:, order[0]], rows.flatten(1, 2)[:, order[1]])
    op.order = "columns"
    assert torch.allclose(op(x), rows)


def test_one_window_without_sinks_is_attention_to_the_whole_map():
    op, x = build(window=7, sinks=0, gated=False)
    torch.nn.init.ones_(op.window_weight)
    full = create_op("window", 6, 2).double()
    torch.nn.init.zeros_(full.relative_position_bias_table)
    full.load_state_dict({name: value for name, value in op.state_dict().items() if "window" not in name}, strict=False)
    assert torch.allclose(op(x), full(x), atol=1e-12)


def test_low_sinks_take_nothing():
    op, x = build(window=3)
    torch.nn.init.constant_(op.sinks, -1e4)
    without, _ = build(window=3, sinks=0)
    without.load_state_dict({name: value for name, value in op.state_dict().items() if name != "sinks"})
    assert torch.allclose(op(x), without(x), atol=1e-12)


def test_reversed_map_gives_the_reversed_output():
    op, x = build(window=0)
    assert torch.allclose(op(x.flip(1, 2)).flip(1, 2), op(x), atol=1e-12)


def test_blocks_alternate_and_heads_forget_at_different_rates():
    assert [create_op("gated_linear_window", 6, 2, place=Place(block=b)).order for b in range(2)] == ["rows", "columns"]
    assert torch.allclose(create_op("gated_linear_window", 6, 3).gate.bias.sigmoid(), torch.tensor([0.99, 0.97, 0.95]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": "snake"}, "order must be one of rows, columns, both, not 'snake'"),
        ({"features": 0}, "features at least 1, not 7, 4 and 0"),
        ({"order": "both"}, "order 'both' needs an even number of heads, not 3"),
        ({"gated": False, "window": 0}, "gated=False needs windows"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_op("gated_linear_window", 6, 3, **arguments)
