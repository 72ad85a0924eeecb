"""Rectified sparse attention: its definition in loops, the cases in which it is full attention, and its use by ops."""

import pytest
import torch

from ops import blocks, create_op
from ops.rectification import pooled_attention

SIZE = (5, 6)
X = torch.randn(1, *SIZE, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EXTRA = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rectified_sparse(**arguments):
    torch.manual_seed(0)
    return create_op("rectified_sparse", dim=8, num_heads=2, **arguments).double()


def alike(x, height, width):
    """Return a map whose tokens resemble the first token of their tile, so that some pairs of tiles are trusted."""
    first = x[:, ::height, ::width].repeat_interleave(height, 1).repeat_interleave(width, 2)
    return 0.3 * x + first[:, : x.shape[1], : x.shape[2]]


@pytest.mark.parametrize("with_extra", [False, True])
@pytest.mark.parametrize("neighbors", [False, True])
def test_attends_as_defined(monkeypatch, with_extra, neighbors):
    monkeypatch.setattr(blocks, "MAX_MASKED_TOKENS", 0)
    op = rectified_sparse(tile=(2, 2), topk=2, share=0.3, neighbors=neighbors)
    x = alike(X, 2, 2)
    tiles: dict = {}
    for y, column in ((y, column) for y in range(SIZE[0]) for column in range(SIZE[1])):
        tiles.setdefault((y // 2, column // 2), []).append((y, column))
    q, k, v = (t.unflatten(-1, (2, 4)) for t in op.qkv(x)[0].chunk(3, dim=-1))
    extra_q, extra_k, extra_v = (t.unflatten(-1, (2, 4)) for t in op.qkv(EXTRA)[0].chunk(3, dim=-1))
    extra_tokens = range(2) if with_extra else ()

    out = torch.zeros(*SIZE, 2, 4, dtype=torch.float64)
    seen = set()
    for h in range(2):
        means = [{a: torch.stack([t[p][h] for p in tiles[a]]).mean(0) for a in tiles} for t in (q, k, v)]
        spreads = [
            {a: torch.stack([(t[p][h] - mean[a]).abs() for p in tiles[a]]).mean(0) for a in tiles}
            for t, mean in ((q, means[0]), (k, means[1]))
        ]
        for a in tiles:
            scores = {b: means[0][a] @ means[1][b] for b in tiles}
            powers = {b: len(tiles[b]) * (scores[b] / 2).exp().item() for b in tiles}
            extra_power = sum((means[0][a] @ extra_k[e, h] / 2).exp().item() for e in extra_tokens)
            total = sum(powers.values()) + extra_power
            weights = {b: powers[b] / total for b in tiles}
            entries = sorted([*weights.items(), ("extra", extra_power / total)], key=lambda entry: -entry[1])
            kept, reached = set(), 0.0
            for rank, (b, weight) in enumerate(entries):
                if rank < 2 or reached <= 0.3:
                    kept.add(b)
                reached += weight
            if neighbors:
                kept |= {b for b in tiles if max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= 1}
            errors = {b: (spreads[0][a] @ means[1][b]).abs() + (means[0][a] @ spreads[1][b]).abs() for b in tiles}
            rest = [b for b in tiles if b not in kept and scores[b].abs() > errors[b]]
            seen |= {b in rest for b in tiles if b not in kept}
            keys = [k[p][h] for b in tiles if b in kept for p in tiles[b]] + [extra_k[e, h] for e in extra_tokens]
            values = [v[p][h] for b in tiles if b in kept for p in tiles[b]] + [extra_v[e, h] for e in extra_tokens]
            added = sum((weights[b] * means[2][b] for b in rest), torch.zeros(4, dtype=torch.float64))
            for p in tiles[a]:
                attended = (torch.stack(keys) @ q[p][h] / 2).softmax(0) @ torch.stack(values)
                out[p][h] = (1 - sum(weights[b] for b in rest)) * attended + added
    assert seen == {False, True}
    expected = op.proj(out.flatten(2)).unsqueeze(0)
    if not with_extra:
        assert torch.allclose(op(x), expected, atol=1e-12)
        return
    ours, ours_extra = op(x, EXTRA)
    assert torch.allclose(ours, expected, atol=1e-12)
    all_k, all_v = torch.cat([extra_k, k.flatten(0, 1)]), torch.cat([extra_v, v.flatten(0, 1)])
    attended = [(extra_q[:, h] @ all_k[:, h].T / 2).softmax(-1) @ all_v[:, h] for h in range(2)]
    assert torch.allclose(ours_extra[0], op.proj(torch.cat(attended, dim=-1)), atol=1e-12)


@pytest.mark.parametrize("case", ["tiles of one token", "constant tiles", "all kept"])
def test_cases_of_full_attention(case):
    op = rectified_sparse(tile=1 if case == "tiles of one token" else 2, topk=99 if case == "all kept" else 2)
    full = create_op("full", dim=8, num_heads=2).double()
    full.load_state_dict(op.state_dict())
    x = X[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2) if case == "constant tiles" else X
    assert torch.allclose(op(x), full(x), atol=1e-12)


def test_without_trust_it_is_plain_sparse_attention():
    op, full = rectified_sparse(tile=2, topk=1, share=0.0), create_op("full", dim=8, num_heads=2).double()
    full.load_state_dict(op.state_dict())
    x = X.clone()
    # Queries and keys of opposite sign in a tile have a mean of about 0
    x[:, :, 1::2] = -x[:, :, ::2]
    with torch.no_grad():
        op.qkv.bias.zero_()
    cut = blocks.Blocks(SIZE, (2, 2))
    q, k, v = (cut.split(t, 2) for t in op.qkv(x).chunk(3, dim=-1))
    pooled = pooled_attention(q, k, cut)
    assert not pooled.trusted.any()
    sparse = blocks.block_attention(q, k, v, op.keep(pooled, cut), cut.real("cpu"))
    assert torch.allclose(op(x), op.proj(cut.join(sparse)), atol=1e-12)


@pytest.mark.parametrize(
    ("name", "arguments", "window"),
    [
        ("rectified_sparse", {"tile": 2, "topk": 1, "share": 0.1}, (2, 2)),
        ("block_mixture", {"tile": 2, "order": "tiles"}, (2, 2)),
        ("bilevel_routing", {"n_win": 3, "topk": 1, "form": "nchw"}, (1, 2)),
    ],
)
def test_other_ops_are_rectified_and_weights_sum_to_one(name, arguments, window):
    if name != "rectified_sparse":
        arguments = {**arguments, "rectify": True}
    torch.manual_seed(0)
    op = create_op(name, dim=8, num_heads=2, **arguments).double()
    x = alike(X, *window)
    if name != "rectified_sparse":
        plain = create_op(name, dim=8, num_heads=2, **{**arguments, "rectify": False}).double()
        plain.load_state_dict(op.state_dict())
        assert not torch.allclose(op(x), plain(x))
    with torch.no_grad():
        op.qkv.weight[16:] = 0
        op.qkv.bias[16:] = 1
        for key, value in op.named_parameters():
            if key.startswith("lepe"):
                value.zero_()
    assert torch.allclose(op(x), op.proj(torch.ones_like(x)), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"tile": 0}, "tile and topk must be at least 1, not 0 and 4"), ({"share": 2.0}, "share must be from 0 to 1")],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rectified_sparse(**arguments)
