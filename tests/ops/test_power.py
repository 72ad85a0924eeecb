"""PowerAttention: its definition in loops, what tokens reach over several blocks, and the cases of other ops."""

import itertools
import math

import pytest
import torch

from ops import Place, blocks, create_op
from ops.blocks import Blocks
from ops.offsets import offset_mask

X = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EXTRA = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def power(**arguments):
    torch.manual_seed(0)
    return create_op("power", dim=8, num_heads=2, **arguments).double()


def is_near(distance):
    return distance == 0 or math.log2(abs(distance)).is_integer()


@pytest.mark.parametrize("with_extra", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {"form": "cross"},
        {"form": "product", "bias": True},
        {"form": "cross", "local": 7},
        {"form": "product", "block": 2},
        {"form": "cross", "block": 2, "local": 3},
    ],
)
def test_attends_as_defined(monkeypatch, arguments, with_extra):
    monkeypatch.setattr(blocks, "MAX_MASKED_TOKENS", 0)
    op = power(**arguments)
    block, local = arguments.get("block", 1), arguments.get("local", 1)
    q, k, v = (t.unflatten(-1, (2, 4)) for t in op.qkv(X).chunk(3, dim=-1))
    extra_k, extra_v = (t.unflatten(-1, (2, 4)) for t in op.qkv(EXTRA).chunk(3, dim=-1)[1:])
    expected = torch.zeros_like(q)
    tokens = list(itertools.product(range(6), range(9)))
    for (y, x), h in itertools.product(tokens, range(2)):
        keys = []
        for key_y, key_x in tokens:
            dy, dx = key_y // block - y // block, key_x // block - x // block
            powers = is_near(dy) and is_near(dx) and (arguments["form"] == "product" or dy == 0 or dx == 0)
            if powers or max(abs(dy), abs(dx)) <= local // 2:
                keys.append((key_y, key_x))
        scores = torch.stack([(q[:, y, x, h] * k[:, a, b, h]).sum(-1) / 2 for a, b in keys], dim=-1)
        if "bias" in arguments:
            # Distances 0, 1, 2, 4 and 8 are steps 0 to 4, beside the middle of a table for 56 tokens
            steps = [[6 + int(math.copysign(abs(d).bit_length(), d)) for d in (a - y, b - x)] for a, b in keys]
            scores = scores + torch.stack([op.bias_table[h, i, j] for i, j in steps])
        values = torch.stack([v[:, a, b, h] for a, b in keys], dim=1)
        if with_extra:
            scores = torch.cat([scores, torch.einsum("bd,bed->be", q[:, y, x, h], extra_k[:, :, h]) / 2], dim=-1)
            values = torch.cat([values, extra_v[:, :, h]], dim=1)
        expected[:, y, x, h] = torch.einsum("bk,bkd->bd", scores.softmax(-1), values)
    ours = op(X, EXTRA)[0] if with_extra else op(X)
    assert torch.allclose(ours, op.proj(expected.flatten(3)), atol=1e-12)


def test_a_central_token_has_as_many_keys_as_the_logarithms_say():
    for side, product in ((14, 49), (56, 121)):
        for form, number in (("product", product), ("cross", 2 * math.isqrt(product) - 1)):
            middle, offsets = side // 2, power(form=form).offsets((side, side))
            assert len(set(offsets)) == len(offsets)
            assert sum(0 <= middle + dy < side and 0 <= middle + dx < side for dy, dx in offsets) == number


@pytest.mark.parametrize("size", [(7, 12), (14, 14), (1, 9)], ids=str)
def test_every_token_reaches_every_other_over_as_many_blocks_as_the_logarithm(size):
    allowed = torch.zeros(2 * size[0] - 1, 2 * size[1] - 1)
    for dy, dx in power(form="product").offsets(size):
        allowed[dy + size[0] - 1, dx + size[1] - 1] = 1
    mask = offset_mask(allowed, size)
    assert (torch.linalg.matrix_power(mask, math.ceil(math.log2(max(size)))) > 0).all()
    assert torch.equal(mask, mask.T)
    assert torch.equal(power(form="product", block=2).pattern(Blocks(size, (1, 1))), mask.bool())


def test_forms_follow_the_stage_and_small_or_fully_local_maps_give_full_attention():
    assert [power(place=Place(stage)).form for stage in range(4)] == ["cross", "cross", "product", "product"]
    for arguments, x in (({"local": 99}, X), ({"form": "product"}, X[:, :3, :3])):
        op, full = power(**arguments), create_op("full", dim=8, num_heads=2).double()
        full.load_state_dict(op.state_dict())
        assert torch.allclose(op(x), full(x), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "star"}, "form must be one of cross, product, not 'star'"),
        ({"local": 2}, "local must be odd and block at least 1, not 2 and 1"),
        ({"bias": True, "block": 2}, "bias is for a block of 1, not 2"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        power(**arguments)
