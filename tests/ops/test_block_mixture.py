"""Mixture-of-block attention: its definition in loops, and the cases in which it is full attention."""

import pytest
import torch

from ops import Place, blocks, create_op

SIZE = (5, 6)
X = torch.randn(2, *SIZE, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def block_mixture(**arguments):
    torch.manual_seed(0)
    return create_op("block_mixture", dim=8, num_heads=2, **arguments).double()


def block_of(token, order):
    """Return the block of a token (row, column): 2 x 4 tiles, or strips of 2."""
    return {"tiles": (token[0] // 2, token[1] // 4), "rows": token[0] // 2, "columns": token[1] // 2}[order]


def chosen_pairs(gates, own, entries, select, amount, each):
    """Return the entries of one scope that are chosen: the own ones and the best others.

    Args:
        gates: the gate of each entry.
        own: the entries of a query's own block.
        entries: all entries of the scope.
        select: "topk" or "threshold".
        amount: number of blocks for each query, or share of the sum.
        each: number of queries and heads in the scope.
    """
    others = sorted((entry for entry in entries if entry not in own), key=lambda entry: -gates[entry])
    if select == "topk":
        return own | set(others[: amount * each - len(own)])
    low, high = min(gates[e] for e in entries), max(gates[e] for e in entries)
    scaled = {e: (gates[e] - low) / (high - low if high - low > 1e-6 else 1) for e in entries}
    total = sum(scaled.values()) + 1e-6
    missing, taken, reached = max(0, amount - sum(scaled[e] for e in own) / total), set(), 0.0
    for entry in others:
        taken.add(entry)
        reached += scaled[entry]
        if reached / total >= missing:
            break
    return own | taken


@pytest.mark.parametrize(
    ("order", "select", "scope"),
    [
        ("rows", "topk", "query_head"),
        ("tiles", "topk", "head_global"),
        ("tiles", "topk", "overall"),
        ("tiles", "threshold", "query_head"),
        ("columns", "threshold", "head_global"),
        ("tiles", "threshold", "overall"),
        ("tiles", "threshold", "block"),
    ],
)
def test_attends_as_defined(monkeypatch, order, select, scope):
    monkeypatch.setattr(blocks, "MAX_MASKED_TOKENS", 0)
    op = block_mixture(order=order, tile=(2, 4), strip=2, select=select, topk=2, threshold=0.4, scope=scope)
    tokens = [(y, x) for y in range(SIZE[0]) for x in range(SIZE[1])]
    members: dict = {}
    for token in tokens:
        members.setdefault(block_of(token, order), []).append(token)
    out = torch.zeros_like(X)
    for b in range(len(X)):
        q, k, v = (t.unflatten(-1, (2, 4)) for t in op.qkv(X[b]).chunk(3, dim=-1))  # (H, W, heads, D)
        means = {c: torch.stack([k[t] for t in inside]).mean(0) for c, inside in members.items()}
        entries = [(t, h, c) for t in tokens for h in range(2) for c in members]
        gates = {(t, h, c): (q[t][h] @ means[c][h]).item() for t, h, c in entries}
        scopes: dict = {}
        for t, h, c in entries:
            key = {"query_head": (t, h), "head_global": h, "overall": 0, "block": c}[scope]
            scopes.setdefault(key, []).append((t, h, c))
        chosen = set()
        for inside in scopes.values():
            own = {(t, h, c) for t, h, c in inside if block_of(t, order) == c}
            each = len({(t, h) for t, h, _ in inside})
            chosen |= chosen_pairs(gates, own, inside, select, 2 if select == "topk" else 0.4, each)
        for t in tokens:
            heads = []
            for h in range(2):
                keys = [other for c in members if (t, h, c) in chosen for other in members[c]]
                scores = torch.stack([q[t][h] @ k[other][h] for other in keys]) / 2
                heads.append(scores.softmax(0) @ torch.stack([v[other][h] for other in keys]))
            out[b][t] = op.proj(torch.cat(heads))
    assert torch.allclose(op(X), out, atol=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        {"tile": 6},
        {"tile": 2, "select": "topk", "topk": 9},
        {"tile": 2, "select": "topk", "topk": 1},
        {"tile": 2, "threshold": 1.0},
        {"tile": 2, "select": "topk", "topk": 9, "rectify": True},
    ],
)
def test_all_blocks_give_full_attention(arguments):
    op, full = block_mixture(order="tiles", **arguments), create_op("full", dim=8, num_heads=2).double()
    full.load_state_dict(op.state_dict())
    assert torch.allclose(op(X), full(X), atol=1e-12)


def test_blocks_alternate_and_strips_have_the_tokens_of_a_tile():
    ops = [block_mixture(place=Place(block=block)) for block in range(4)]
    assert [op.cut(56, 28).block for op in ops] == [(2, 28), (56, 1), (7, 7), (2, 28)]


def test_rectified_weights_sum_to_one():
    op = block_mixture(order="tiles", tile=2, select="topk", topk=2, rectify=True)
    with torch.no_grad():
        op.qkv.weight[16:] = 0
        op.qkv.weight[:16] *= 0.01
        op.qkv.bias[:16] = 1
    assert torch.allclose(op(X), op.proj(op.qkv.bias[16:]).expand_as(X), atol=1e-12)


def test_topk_compiles_as_one_graph(monkeypatch):
    monkeypatch.setattr(blocks, "MAX_MASKED_TOKENS", 0)
    op = block_mixture(order="tiles", tile=2, select="topk", topk=2)
    assert op.fullgraph
    compiled = torch.compile(op, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(X), op(X), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": "cubes"}, "order must be one of rows, columns, tiles, not 'cubes'"),
        ({"select": "topk", "scope": "block"}, "scope 'block' is for select='threshold' only"),
        ({"select": "topk", "topk": 0}, "topk must be at least 1, not 0"),
        ({"tile": 0}, "tile and strip must be at least 1, not 0"),
        ({"threshold": 2.0}, "threshold must be a share from 0 to 1"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        block_mixture(**arguments)
