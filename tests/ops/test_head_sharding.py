"""Head-sharded attention: its pattern in loops, what the heads see together, and the cases of full attention."""

import itertools

import pytest
import torch

from ops import Place, create_op
from ops.blocks import Blocks

X = torch.randn(2, 5, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GRID = Blocks((10, 12), (2, 3))


def head_sharding(num_heads=4, **arguments):
    torch.manual_seed(0)
    return create_op("head_sharding", dim=16, num_heads=num_heads, **arguments).double()


def equal_to_full(op):
    full = create_op("full", dim=16, num_heads=op.num_heads).double()
    full.load_state_dict(op.state_dict())
    return torch.allclose(op(X), full(X), atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {"order": "runs", "block": 5, "local": 2},
        {"order": "runs", "block": 5, "local": (3, 2), "offset": 1, "step": 2},
        {"order": "runs", "block": 5, "local": 2, "position": "relative"},
        {"block": (2, 3), "local": 2, "dense_heads": 1},
        {"block": (2, 3), "stripes": "alternating", "stride": 3},
        {"block": (2, 3), "local": 2, "position": "relative"},
        {"block": (2, 3), "homogeneous": True},
    ],
)
def test_pattern_is_as_defined(arguments, causal):
    op = head_sharding(causal=causal, **arguments)
    cut = Blocks((1, 60), (1, 5)) if arguments.get("order") == "runs" else GRID
    before, after = (
        (arguments["local"],) * 2
        if isinstance(arguments.get("local", 1), int) and "local" in arguments
        else (arguments.get("local", (1, 1)))
    )
    stride, step, offset = arguments.get("stride", 4), arguments.get("step", 1), arguments.get("offset", 0)
    pattern = op.pattern(cut)
    for head, i, j in itertools.product(range(4), range(cut.number), range(cut.number)):
        rows, columns = (i // cut.grid[1], j // cut.grid[1]), (i % cut.grid[1], j % cut.grid[1])
        if "order" in arguments or causal:
            beyond = max(0, i - j - before + 1) + max(0, j - i - (1 if causal else after) + 1)
        else:
            beyond = max(0, max(abs(rows[0] - rows[1]), abs(columns[0] - columns[1])) - before + 1)
        place = j
        if "stripes" in arguments:
            place = (columns[1], rows[1], rows[1] + columns[1])[head % 3]
        number = 0 if "homogeneous" in arguments else head
        if head == 3 and "dense_heads" in arguments:
            kept = True
        elif "position" in arguments:
            kept = beyond % stride == 0
        else:
            kept = beyond == 0 or (place + number * step + offset) % stride == 0
        assert pattern[head, i, j] == (kept and (j <= i or not causal)), (head, i, j)


def test_attends_to_the_tokens_of_its_pattern():
    op = head_sharding(num_heads=2, block=(2, 3), stride=2, causal=True, kv_heads=1)
    tile = [(y // 2) * 2 + x // 3 for y in range(5) for x in range(6)]
    within = [(y % 2) * 3 + x % 3 for y in range(5) for x in range(6)]
    pattern = op.pattern(Blocks((5, 6), (2, 3)))
    q, k, v = op.qkv(X).flatten(1, 2).split((16, 8, 8), dim=-1)
    out = torch.zeros_like(q)
    for b, i, h in itertools.product(range(2), range(30), range(2)):
        keys = [j for j in range(30) if pattern[h, tile[i], tile[j]] and (tile[j], within[j]) <= (tile[i], within[i])]
        weights = (k[b, keys] @ q[b, i, 8 * h : 8 * h + 8] / 8**0.5).softmax(0)
        out[b, i, 8 * h : 8 * h + 8] = weights @ v[b, keys]
    assert torch.allclose(op(X).flatten(1, 2), op.proj(out), atol=1e-12)


@pytest.mark.parametrize(("kv_heads", "covers"), [(4, True), (2, False)])
def test_heads_together_attend_to_everything_if_there_are_as_many_as_the_stride(kv_heads, covers):
    op = head_sharding(kv_heads=kv_heads, stride=4, step=1)
    pattern = op.pattern(GRID)
    assert bool(pattern.any(0).all()) == covers
    assert pattern.any(2).all() and not pattern.all(2).any()
    assert all(torch.equal(pattern[h], pattern[h * kv_heads // 4 * (4 // kv_heads)]) for h in range(4))


def test_blocks_of_a_stage_together_attend_to_everything_with_few_heads():
    for heads, stride in ((1, 2), (1, 4), (2, 4), (5, 4)):
        stage = [
            create_op("head_sharding", dim=10 * heads, num_heads=heads, stride=stride, place=Place(block=block))
            for block in range(stride)
        ]
        assert torch.cat([op.pattern(GRID) for op in stage]).any(0).all()


@pytest.mark.parametrize("arguments", [{"stride": 1}, {"local": 9}, {"dense_heads": 4}, {"block": 6}])
def test_cases_of_full_attention(arguments):
    assert equal_to_full(head_sharding(**{"block": 2, **arguments}))


def test_permuted_heads_of_one_pattern_permute_the_outputs():
    op = head_sharding(block=2, homogeneous=True)
    op.proj = torch.nn.Identity()
    before = op(X)
    order = torch.arange(16).unflatten(0, (4, 4)).flip(0).flatten()
    with torch.no_grad():
        for value in (op.qkv.weight, op.qkv.bias):
            value.copy_(value.unflatten(0, (3, 16))[:, order].flatten(0, 1))
    assert torch.allclose(op(X), before[..., order], atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stripes": "spiral"}, "stripes must be one of raster, alternating, not 'spiral'"),
        ({"local": 0}, "block, local, stride and step must be at least 1"),
        ({"local": (2, 1)}, "local must be one number for tiles"),
        ({"order": "runs", "block": (2, 2)}, "runs take a single number as block"),
        ({"kv_heads": 3}, "kv_heads must divide 4"),
        ({"homogeneous": True, "dense_heads": 1}, "homogeneous heads cannot include dense_heads"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        head_sharding(**arguments)
