"""Combiner: definitions by loops, and special cases that are full attention."""

import pytest
import torch

from ops import create_op

X = torch.randn(2, 4, 5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = [(r, c) for r in range(4) for c in range(5)]


def combiner(**arguments):
    torch.manual_seed(0)
    return create_op("combiner", 12, 3, **arguments).double()


def heads_of(op, x):
    """Yield the channels of each head, and its queries, keys and values (H, W, 4)."""
    for h in range(3):
        yield slice(4 * h, 4 * h + 4), *(op.qkv(x)[..., 12 * t + 4 * h : 12 * t + 4 * h + 4] for t in range(3))


def weighted(q, keys, values):
    """Return the attention of one query to lists of keys and values."""
    return (torch.stack(keys) @ q / 2).softmax(0) @ torch.stack(values)


def pooled(op, members, projection):
    x = torch.stack(members)
    if op.activation == "deepset":
        x = projection(x)
    x = x if op.activation == "identity" else x.relu()
    return x.amax(0) if op.pooling == "max" else x.mean(0) if op.pooling == "mean" else x.sum(0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("summary", ["identity-max", "relu-mean", "deepset-sum"])
@pytest.mark.parametrize(("form", "side"), [("windows", 3), ("rows", 1)])
def test_segments_attend_as_defined(form, side, summary, causal):
    op = combiner(form=form, window=3, local_summary=summary, causal=causal)
    segment_of = lambda r, c: (r // side, c // side if form == "windows" else 0)  # noqa: E731
    segments: dict[tuple[int, int], list] = {}
    for token in TOKENS:
        segments.setdefault(segment_of(*token), []).append(token)
    out = torch.zeros_like(X)
    for b in range(2):
        for part, q, k, v in heads_of(op, X[b]):
            keys, values = {}, {}
            for name, members in segments.items():
                keys[name] = pooled(op, [k[t] for t in members], op.summary_k)
                query = pooled(op, [q[t] for t in members], op.summary_q)
                values[name] = weighted(query, [k[t] for t in members], [v[t] for t in members])
            for token in TOKENS:
                own = segment_of(*token)
                near = [t for t in segments[own] if not causal or t <= token]
                far = [name for name in segments if (name < own if causal else name != own)]
                all_keys = [k[t] for t in near] + [keys[s] for s in far]
                all_values = [v[t] for t in near] + [values[s] for s in far]
                out[(b, *token)][part] = weighted(q[token], all_keys, all_values)
    assert torch.allclose(op(X), op.proj(out), atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("summary", ["none", "wsum", "proj", "wsum_proj"])
def test_rows_attend_axially_as_defined(summary, causal):
    op, out = combiner(form="axial", row_summary=summary, causal=causal), torch.zeros_like(X)
    for b in range(2):
        for part, q, k, v in heads_of(op, X[b]):
            for r, c in TOKENS:
                near = [(r, j) for j in range(c + 1 if causal else 5)]
                keys, values = [k[t] for t in near], [v[t] for t in near]
                for row in range(r) if causal else (i for i in range(4) if i != r):
                    values.append(weighted(q[row, c], list(k[row]), list(v[row])))
                    key = values[-1] if summary == "proj" else k[row, c]
                    if "wsum" in summary:
                        key = weighted(q[row, c], list(k[row]), list(k[row]))
                    keys.append(op.row_proj(key) if "proj" in summary else key)
                out[b, r, c, part] = weighted(q[r, c], keys, values)
    assert torch.allclose(op(X), op.proj(out), atol=1e-12)


@pytest.mark.parametrize("arguments", [{"window": 1}, {"window": 5}, {"window": 1, "local_summary": "identity-sum"}])
def test_segments_of_one_or_of_all_tokens_are_full_attention(arguments):
    op, full = combiner(**arguments), create_op("full", 12, 3).double()
    full.load_state_dict(op.state_dict())
    assert torch.allclose(op(X), full(X), atol=1e-12)


def test_one_row_is_full_attention():
    row = X[:, :1]
    for form in ("rows", "axial"):
        op, full = combiner(form=form, row_summary="none"), create_op("full", 12, 3).double()
        full.load_state_dict(op.state_dict())
        assert torch.allclose(op(row), full(row), atol=1e-12)


@pytest.mark.parametrize("form", ["windows", "rows", "axial"])
@pytest.mark.parametrize("summary", ["identity-mean", "deepset-max"])
def test_every_form_trains_all_parameters(form, summary):
    op = combiner(form=form, window=3, local_summary=summary)
    op(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in op.parameters())
    assert torch.allclose(op(X)[1:], op(X[1:]), atol=1e-12) and op(X[:, :1, :1]).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "columns"}, "form must be one of windows, rows, axial, not 'columns'"),
        ({"window": 0}, "window must be at least 1, not 0"),
        ({"local_summary": "max"}, "identity|relu|deepset and max|mean|sum, joined by '-', not 'max'"),
        ({"row_summary": "sum"}, "row_summary must be one of none, wsum, proj, wsum_proj, not 'sum'"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        combiner(**arguments)
    assert message in str(error.value)
