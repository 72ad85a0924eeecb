"""Block-sparse attention with a dense switch: its definition in loops, and when it is full attention."""

import itertools

import pytest
import torch

from ops import blocks, create_op

SIZE = (7, 10)
X = torch.randn(1, *SIZE, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EXTRA = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def switch(**arguments):
    torch.manual_seed(0)
    arguments = {"dense_below": 0, **arguments}
    return create_op("block_sparse_switch", dim=8, num_heads=4, **arguments).double()


@pytest.mark.parametrize("per", ["token", "tile"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"tile": 4, "stride": 2, "topk": 3, "local": 1, "kv_heads": 2},
        {"tile": 3, "stride": 2, "topk": 10, "local": 2},
        {"tile": 2, "stride": 3, "topk": 4, "local": 0, "kv_heads": 1},
    ],
)
def test_attends_as_defined(monkeypatch, arguments, per):
    monkeypatch.setattr(blocks, "MAX_MASKED_TOKENS", 0)
    op = switch(per=per, **arguments)
    tile, stride, shared = arguments["tile"], arguments["stride"], 4 // arguments.get("kv_heads", 4)
    q, k, v = op.qkv(X).split(op.widths, dim=-1)
    q, k, v = (t.unflatten(-1, (-1, 2)) for t in (q, k, v))  # (B, H, W, heads, D)
    extra_k, extra_v = (t.unflatten(-1, (-1, 2)) for t in op.qkv(EXTRA).split(op.widths, dim=-1)[1:])
    tokens = list(itertools.product(range(SIZE[0]), range(SIZE[1])))
    tiles: dict = {}
    for y, x in tokens:
        tiles.setdefault((y // tile, x // tile), []).append((y, x))
    # Patches start every `stride` tokens until one reaches the end of the map
    starts = itertools.product(*([s for s in range(0, n, stride) if s == 0 or s + stride < n] for n in SIZE))
    patches = [
        [t for t in tokens if all(s <= p < s + 2 * stride for s, p in zip(start, t, strict=True))] for start in starts
    ]
    patch_of_tile = {a: [i for i, patch in enumerate(patches) if set(patch) & set(tiles[a])] for a in tiles}
    expected = torch.zeros_like(q)
    for b, group in itertools.product(range(1), range(4 // shared)):
        heads = range(group * shared, (group + 1) * shared)
        means = torch.stack([torch.stack([k[b, y, x, group] for y, x in patch]).mean(0) for patch in patches])
        for y, x in tokens:
            own = (y // tile, x // tile)
            asking = [(y, x)] if per == "token" else tiles[own]
            queries = [torch.stack([q[b, i, j, h] for i, j in asking]).mean(0) for h in heads]
            scores = sum(((means @ query / 2**0.5).softmax(0) for query in queries), torch.zeros(len(patches)))
            near = [a for a in tiles if max(abs(a[0] - own[0]), abs(a[1] - own[1])) < arguments["local"]]
            # A patch may be the best of several tiles; the first ones are taken
            best = {a: -max(scores[i].item() for i in patch_of_tile[a]) for a in tiles if a not in near}
            others = sorted(best, key=lambda a: round(best[a], 12))
            chosen = [*near, *others][: arguments["topk"]]
            keys = [t for a in chosen for t in tiles[a]]
            all_k = torch.cat([torch.stack([k[b, i, j, group] for i, j in keys]), extra_k[b, :, group]])
            all_v = torch.cat([torch.stack([v[b, i, j, group] for i, j in keys]), extra_v[b, :, group]])
            for h in heads:
                expected[b, y, x, h] = (all_k @ q[b, y, x, h] / 2**0.5).softmax(0) @ all_v
    assert torch.allclose(op(X, EXTRA)[0], op.proj(expected.flatten(3)), atol=1e-12)


@pytest.mark.parametrize("arguments", [{"dense_below": 71}, {"topk": 99}, {"topk": 99, "rectify": True}])
def test_small_maps_and_all_tiles_give_full_attention(arguments):
    op, full = switch(tile=2, **arguments), create_op("full", dim=8, num_heads=4).double()
    full.load_state_dict(op.state_dict())
    for ours, expected in zip(op(X, EXTRA), full(X, EXTRA), strict=True):
        assert torch.allclose(ours, expected, atol=1e-12)
    assert not torch.allclose(switch(tile=2, topk=9)(X), full(X), atol=1e-3)


def test_rectified_weights_sum_to_one():
    for per in ("token", "tile"):
        op = switch(tile=2, stride=1, topk=2, local=1, per=per, rectify=True)
        plain = switch(tile=2, stride=1, topk=2, local=1, per=per)
        x = 0.1 * X + 1
        assert not torch.allclose(op(x), plain(x))
        with torch.no_grad():
            op.qkv.weight[16:] = 0
            op.qkv.bias[16:] = 1
        assert torch.allclose(op(x), op.proj(torch.ones_like(x)), atol=1e-12)


def test_sparse_form_compiles_as_one_graph(monkeypatch):
    monkeypatch.setattr(blocks, "MAX_MASKED_TOKENS", 0)
    op = switch(tile=2, stride=1, topk=2, local=1)
    compiled = torch.compile(op, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(X), op(X), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topk": 0}, "tile, stride and topk must be at least 1 and local at least 0, not 8, 4, 0 and 2"),
        ({"per": "map"}, "per must be one of token, tile, not 'map'"),
        ({"kv_heads": 3}, "kv_heads must divide 4, the number of heads, not 3"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        switch(**arguments)
