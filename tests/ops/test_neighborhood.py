"""Neighbourhood attention equals its definition, token by token, and calls NATTEN where NATTEN can run."""

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ops import Place, backend, create_op, neighborhood
from ops.neighborhood import natten_na2d, neighborhood_attention

# Size of the map, size of the neighbourhood, dilation, stride, causal
CASES = {
    "plain": ((9, 8), (5, 3), (1, 1), (1, 1), (False, False)),
    "of the whole map": ((5, 6), (5, 6), (1, 1), (1, 1), (False, False)),
    "dilated": ((11, 8), (3, 3), (3, 2), (1, 1), (False, False)),
    "even": ((9, 10), (4, 2), (2, 1), (1, 2), (False, False)),
    "strided": ((13, 14), (5, 4), (1, 1), (2, 3), (False, False)),
    "windows": ((8, 9), (4, 3), (1, 1), (4, 3), (False, False)),
    "causal": ((8, 7), (4, 3), (2, 1), (1, 1), (True, True)),
    "causal, strided": ((10, 9), (5, 3), (1, 2), (3, 2), (True, False)),
}


def neighbors(position: int, n: int, kernel: int, dilation: int, stride: int, causal: int) -> dict[int, int]:
    """Return the keys that the query at a position on a side of n tokens attends to.

    The result maps the position of each key to its offset from the query within their dilation group.
    """
    group = [key for key in range(n) if key % dilation == position % dilation]
    query = group.index(position)
    first = query - query % stride
    if causal:
        last = min(first + stride, len(group)) - 1
        attended = [key for key in range(len(group)) if last - kernel < key <= query]
    else:
        centre = min(first + stride // 2, len(group) - 1)
        start = min(max(centre - kernel // 2, 0), len(group) - kernel)
        attended = list(range(start, start + kernel))
    return {group[key]: key - query for key in attended}


@pytest.mark.parametrize("case", CASES)
def test_each_token_attends_to_its_neighborhood(case):
    (H, W), kernel, *rest = CASES[case]
    rule: Any = (kernel, *rest)
    heads = 2
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, H, W, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(heads, *(2 * side - 1 for side in kernel), dtype=torch.float64, requires_grad=True)
    expected = torch.zeros_like(q)
    for y in range(H):
        for x in range(W):
            rows = neighbors(y, H, *(values[0] for values in rule))
            columns = neighbors(x, W, *(values[1] for values in rule))
            keys = [(a, b, i + kernel[0] - 1, j + kernel[1] - 1) for a, i in rows.items() for b, j in columns.items()]
            parts = []
            for h in range(heads):
                part = slice(3 * h, 3 * h + 3)
                scores = [(q[:, y, x, part] * k[:, a, b, part]).sum(-1) / math.sqrt(3) + bias[h, i, j]
                          for a, b, i, j in keys]  # fmt: skip
                values = torch.stack([v[:, a, b, part] for a, b, *_ in keys], 1)
                parts.append((torch.stack(scores, 1).softmax(1).unsqueeze(-1) * values).sum(1))
            expected = expected.index_put((torch.arange(2), torch.tensor(y), torch.tensor(x)), torch.cat(parts, -1))
    out = neighborhood_attention(torch.cat((q, k, v), -1), bias, heads, *rule)
    assert torch.allclose(out, expected, atol=1e-12)
    weights = torch.randn_like(out)
    grads = [torch.autograd.grad((t * weights).sum(), (q, k, v, bias), retain_graph=True) for t in (out, expected)]
    assert all(torch.allclose(*pair, atol=1e-11) for pair in zip(*grads, strict=True))


@pytest.fixture
def natten(monkeypatch):
    """Install a stand-in for NATTEN whose attention is our plain PyTorch."""

    def na2d(query, key, value, kernel_size, stride, dilation, is_causal):
        qkv = torch.cat([t.flatten(-2) for t in (query, key, value)], -1)
        rule = (kernel_size, dilation, stride, is_causal)
        return neighborhood.tiled_attention(qkv, None, query.shape[-2], *rule).unflatten(-1, query.shape[-2:])

    module = SimpleNamespace(na2d=na2d, HAS_LIBNATTEN=True)
    monkeypatch.setitem(sys.modules, "natten", module)
    monkeypatch.setattr(neighborhood, "NATTEN_INSTALLED", True)
    return module


@pytest.mark.parametrize("case", CASES)
def test_natten_receives_the_same_arguments(natten, monkeypatch, case):
    (H, W), *values = CASES[case]
    rule: Any = values
    torch.manual_seed(0)
    qkv = torch.randn(2, H, W, 3 * 16)
    expected = neighborhood_attention(qkv, None, 2, *rule)
    monkeypatch.setattr(neighborhood, "natten_na2d", lambda *args: natten.na2d)
    monkeypatch.setattr(neighborhood, "use_triton", None)
    assert torch.equal(neighborhood_attention(qkv, None, 2, *rule), expected)


def test_natten_is_used_only_where_it_can_run(natten, monkeypatch):
    with FakeTensorMode():
        on_gpu = torch.empty(1, 7, 7, 3 * 16, device="cuda")
    assert natten_na2d(on_gpu, 2, (3, 3)) is natten.na2d
    assert natten_na2d(torch.empty(1, 7, 7, 3 * 16), 2, (3, 3)) is None
    # Heads of 4 channels
    assert natten_na2d(on_gpu, 4, (3, 3)) is None
    assert natten_na2d(on_gpu, 2, (3, 1)) is None
    for name in ("torch", "triton"):
        monkeypatch.setitem(backend._state, "backend", name)
        assert natten_na2d(on_gpu, 2, (3, 3)) is None
    monkeypatch.setitem(backend._state, "backend", "auto")
    natten.HAS_LIBNATTEN = False
    assert natten_na2d(on_gpu, 2, (3, 3)) is None


def test_natten_is_not_used_with_a_bias(natten, monkeypatch):
    monkeypatch.setattr(neighborhood, "natten_na2d", None)
    qkv, bias = torch.randn(1, 7, 7, 3 * 16), torch.randn(2, 5, 5)
    assert neighborhood_attention(qkv, bias, 2, (3, 3)).shape == (1, 7, 7, 16)


def test_a_map_smaller_than_the_neighborhood_is_padded():
    torch.manual_seed(0)
    op = create_op("neighborhood", 8, 2, kernel=3, dilation=(2, 1))
    x = torch.randn(2, 4, 2, 8)
    assert torch.equal(op(x), op(F.pad(x, (0, 0, 0, 1, 0, 2)))[:, :4, :2])


def test_every_second_block_is_dilated_as_far_as_the_map_allows():
    """Compare with DiNAT's dilations, 8, 4, 2 and 1 on the maps of an image of 224 pixels, and with other maps."""
    undilated, dilated = (create_op("neighborhood", 8, 2, place=Place(block=block)) for block in (0, 1))
    for side, dilation in ((56, 8), (28, 4), (14, 2), (7, 1), (5, 1), (58, 8)):
        x = torch.randn(1, side, 7, 8)
        for op, expected in ((undilated, 1), (dilated, dilation)):
            reference = create_op("neighborhood", 8, 2, dilation=(expected, 1))
            reference.load_state_dict(op.state_dict())
            assert torch.equal(op(x), reference(x))


def test_flops_count_only_pairs_that_attend_to_each_other():
    with torch.device("meta"):
        op, x = create_op("neighborhood", 8, 2, kernel=(5, 3), dilation=(2, 1)), torch.empty(1, 20, 15, 8)
    with FlopCounterMode(display=False) as counter:
        op(x)
    assert counter.get_total_flops() == 2 * 20 * 15 * (4 * 8**2 + 2 * 5 * 3 * 8)


def test_bias_table_of_another_size_is_interpolated():
    small, large = (create_op("neighborhood", 8, 2, kernel=kernel) for kernel in (3, 5))
    table = large.resize_table("relative_position_bias_table", torch.ones(2, 5, 5))
    assert torch.allclose(table, torch.ones_like(large.relative_position_bias_table))
    assert small.relative_position_bias_table.shape == (2, 5, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": 3, "stride": (1, 4)}, r"stride from 1 to kernel, not 3 and \(1, 4\)"),
        ({"dilation": 0}, "dilation must be at least 1, not 0"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_op("neighborhood", 8, 2, **arguments)
