"""Core context aware attention: definitions by loops, special cases, and each token counts once."""

import math

import pytest
import torch

from ops import create_op

X = torch.randn(2, 5, 7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def core_context(**arguments):
    torch.manual_seed(0)
    return create_op("core_context", 12, 3, **arguments).double()


def full_attention(op):
    full = create_op("full", 12, 3).double()
    full.load_state_dict(op.state_dict())
    return full


def heads_of(op, x):
    """Yield the channels of each head, and its queries, keys and values (tokens, 4)."""
    qkv = op.qkv(x).flatten(0, 1)
    for h in range(3):
        yield slice(4 * h, 4 * h + 4), *(qkv[:, 12 * t + 4 * h : 12 * t + 4 * h + 4] for t in range(3))


@pytest.mark.parametrize("log_count", [False, True])
@pytest.mark.parametrize("evaluator", [None, "center", "last"])
@pytest.mark.parametrize("reach", [0, 1])
def test_tiles_attend_as_defined(reach, evaluator, log_count):
    op, out = core_context(tile=2, reach=reach, evaluator=evaluator, log_count=log_count), torch.zeros_like(X)
    tiles: dict[tuple[int, int], list] = {}
    for i in range(35):
        tiles.setdefault((i // 7 // 2, i % 7 // 2), []).append(i)
    for b in range(2):
        for part, q, k, v in heads_of(op, X[b]):
            cores = {}
            for tile, members in tiles.items():
                query = {None: q[members].mean(0), "center": q[center(members)], "last": q[members[-1]]}[evaluator]
                weights = (k[members] @ query / 2).softmax(0)
                cores[tile] = (weights @ k[members], weights @ v[members], math.log(len(members)) if log_count else 0.0)
            for tile, members in tiles.items():
                near = {t for t in tiles if max(abs(t[0] - tile[0]), abs(t[1] - tile[1])) <= reach}
                tokens = [i for t in sorted(near) for i in tiles[t]]
                far = [cores[t] for t in tiles if t not in near]
                keys, values = (torch.stack([*t[tokens], *(core[n] for core in far)]) for n, t in ((0, k), (1, v)))
                extra = torch.tensor([0.0] * len(tokens) + [core[2] for core in far], dtype=torch.float64)
                for i in members:
                    out[b, i // 7, i % 7, part] = (keys @ q[i] / 2 + extra).softmax(0) @ values
    assert torch.allclose(op(X), op.proj(out), atol=1e-12)


def center(members):
    """Return the token in the middle of a tile, or after it."""
    rows, columns = sorted({i // 7 for i in members}), sorted({i % 7 for i in members})
    return 7 * rows[len(rows) // 2] + columns[len(columns) // 2]


@pytest.mark.parametrize(("group", "window"), [(4, 1), (4, 3), (4, 4), (4, 6), (5, 9), (1, 2), (3, 30)])
def test_causal_form_attends_as_defined(group, window):
    op, out = core_context(causal=True, group=group, window=window), torch.zeros(2, 35, 12, dtype=torch.float64)
    for b in range(2):
        for part, q, k, v in heads_of(op, X[b]):
            keys, values = [], []
            for i in range(35 // group):
                members = slice(i * group, (i + 1) * group)
                weights = (k[members] @ q[(i + 1) * group - 1] / 2).softmax(0)
                keys.append(weights @ k[members])
                values.append(weights @ v[members])
            # Tokens are counted from 1, as in the paper
            for t in range(1, 36):
                cores = max(0, (t - window) // group)
                near = slice(cores * group, t)
                all_keys, all_values = torch.stack([*keys[:cores], *k[near]]), torch.stack([*values[:cores], *v[near]])
                out[b, t - 1, part] = (all_keys @ q[t - 1] / 2).softmax(0) @ all_values
    assert torch.allclose(op(X).flatten(1, 2), op.proj(out), atol=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        {"tile": 3, "reach": 0}, {"tile": 2, "reach": 1}, {"tile": 1, "reach": 2}, {"tile": 9},
        *({"causal": True, "group": g, "window": s} for g, s in ((4, 1), (4, 4), (4, 7), (3, 11), (1, 1), (40, 3))),
    ],
)  # fmt: skip
def test_each_token_counts_once(arguments):
    op = core_context(**arguments)
    blocks = op.cut((1, 35) if op.causal else (5, 7))
    near, mask = op.plan(blocks, torch.device("cpu"))
    L = blocks.block[0] * blocks.block[1]
    # Number of each token of the padded map, in the order of the tiles
    tokens, real = torch.arange(blocks.number * L).view(-1, L), blocks.real("cpu")
    for tile in range(blocks.number):
        for offset in range(L):
            if not real[tile, offset]:
                continue
            attended = mask[tile, min(offset, mask.shape[1] - 1)]
            seen = tokens[near[tile]].flatten()[attended[: -blocks.number]].tolist()
            for core in attended[-blocks.number :].nonzero().flatten():
                seen += tokens[core][real[core]].tolist()
            last = tokens[tile, offset] if op.causal else blocks.number * L
            assert sorted(seen) == [int(t) for t in tokens[real] if t <= last]


def test_tiles_of_one_token_and_near_tiles_everywhere_are_full_attention():
    for arguments in ({"tile": 1, "reach": 0}, {"tile": 2, "reach": 3}, {"tile": 7}):
        op = core_context(**arguments)
        assert torch.allclose(op(X), full_attention(op)(X), atol=1e-12)


def test_equal_tokens_in_a_tile_count_as_such_with_log_count():
    x = X[:, :2, :3].repeat_interleave(2, 1).repeat_interleave(2, 2)
    for log_count in (False, True):
        op = core_context(tile=2, reach=0, log_count=log_count)
        assert torch.allclose(op(x), full_attention(op)(x), atol=1e-12) == log_count


def test_a_long_window_is_causal_attention():
    op = core_context(causal=True, group=4, window=35)
    q, k, v = op.qkv(X).flatten(1, 2).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    mask = torch.full((35, 35), -torch.inf, dtype=torch.float64).triu(1)
    expected = ((q @ k.transpose(-2, -1) / 2 + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(op(X).flatten(1, 2), op.proj(expected), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"evaluator": "first"}, "evaluator must be one of mean, center, last, not 'first'"),
        ({"tile": 0}, "tile, group and window must be at least 1 and reach at least 0, not 0, 16, 1024 and 1"),
        ({"reach": -1}, "not 4, 16, 1024 and -1"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        core_context(**arguments)
