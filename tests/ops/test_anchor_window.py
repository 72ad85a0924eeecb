"""Windows with anchors equal their definition, token by token, and other ops in special cases."""

import math

import pytest
import torch

from ops import create_op


def defined(op, x):
    """Compute the op's output (H, W, C) for each token alone, by the rules of the paper."""
    (H, W), (wy, wx), pool = x.shape[1:3], op.window, op.pool
    split = lambda t: t.unflatten(-1, (op.num_heads, -1))  # noqa: E731
    q, k, v = (split(t) for t in op.qkv(x)[0].chunk(3, -1))
    tokens = [(y, x) for y in range(H) for x in range(W)]
    anchors = {}
    for a in range(math.ceil(H / pool)):
        for b in range(math.ceil(W / pool)):
            mean = torch.stack([x[0, i, j] for i, j in tokens if (i // pool, j // pool) == (a, b)]).mean(0)
            _, key, value = op.qkv(mean).chunk(3, -1)
            if op.change:
                key, value = key + op.change[0](mean), value + op.change[1](mean)
            anchors[a, b] = split(key), split(value)
    local = op.anchors == "local"
    out = torch.zeros_like(x[0])
    for i, j in tokens:
        keys, table = [], op.relative_position_bias_table
        rolled_i, rolled_j = (i + op.shift) % H, (j + op.shift) % W
        for a, b in tokens:
            if op.sliding:
                near = abs(a - i) <= wy // 2 and abs(b - j) <= wx // 2
                offset = a - i + wy // 2, b - j + wx // 2
            else:
                rolled_a, rolled_b = (a + op.shift) % H, (b + op.shift) % W
                near = (rolled_a // wy, rolled_b // wx) == (rolled_i // wy, rolled_j // wx)
                offset = rolled_a - rolled_i + wy - 1, rolled_b - rolled_j + wx - 1
            if near:
                bias = table[:, offset[0], offset[1]] if table is not None else torch.zeros(op.num_heads)
                keys.append((k[a, b], v[a, b], bias))
        # The window, or the block after the shift, lies in a tile of anchors
        place = (i // wy, j // wx) if op.sliding else (rolled_i // wy, rolled_j // wx)
        for (a, b), (key, value) in anchors.items():
            if not local or (abs(a // wy - place[0] // pool) <= 1 and abs(b // wx - place[1] // pool) <= 1):
                keys.append((key, value, torch.zeros(op.num_heads)))
        key, value, bias = (torch.stack(t) for t in zip(*keys, strict=True))
        weights = ((key * q[i, j]).sum(-1) / math.sqrt(q.shape[-1]) + bias).softmax(0)
        out[i, j] = op.proj((weights.unsqueeze(-1) * value).sum(0).flatten())
    return out


@pytest.mark.parametrize(
    ("size", "arguments"),
    [
        ((9, 6), {"window": (4, 3), "pool": 2, "rank": 2}),
        ((9, 7), {"window": (4, 3), "pool": 2, "form": "block", "shift": 1}),
        ((17, 8), {"window": 2, "pool": 2, "anchors": "local"}),
        ((17, 8), {"window": 2, "pool": 2, "anchors": "local", "form": "block", "shift": 1}),
    ],
    ids=str,
)
def test_tokens_attend_as_defined(size, arguments):
    torch.manual_seed(0)
    op = create_op("anchor_window", 8, 2, **arguments).double()
    x = torch.randn(1, *size, 8, dtype=torch.float64)
    assert torch.allclose(op(x)[0], defined(op, x), atol=1e-12)


def test_anchors_are_the_cells_of_circular_local_attention_with_equal_weights():
    """Both windows cover the map, so that the square and the circle hold the same tokens."""
    torch.manual_seed(0)
    op = create_op("anchor_window", 8, 2, window=21, pool=4, bias=False)
    circular = create_op("circular_local", 8, 2, radius=20, pool=4)
    circular.load_state_dict(op.state_dict() | {"spatial_weight": torch.full((4, 4), 1 / 16)})
    x = torch.randn(2, 9, 10, 8)
    assert torch.allclose(op(x), circular(x), atol=1e-6)


def test_equal_tokens_give_equal_outputs():
    torch.manual_seed(0)
    op = create_op("anchor_window", 8, 2, window=4, pool=2, form="block", shift=1)
    out = op(torch.randn(8).expand(1, 9, 7, 8))
    assert torch.allclose(out, out[:, :1, :1], atol=1e-6)


def test_large_maps_have_local_anchors_and_linear_cost():
    torch.manual_seed(0)
    op = create_op("anchor_window", 4, 1, window=2, pool=2)
    x = torch.randn(1, 34, 34, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(op(x)[0, 0, 0].sum(), x)
    # Two tiles of 2 anchors of 2 tokens along each side
    assert (gradient.abs().sum((0, 2, 3)) > 0).tolist() == [True] * 8 + [False] * 26
    assert create_op("anchor_window", 4, 1, window=2, pool=2)(torch.randn(1, 32, 32, 4)).isfinite().all()


def test_scores_are_scaled_by_the_number_of_keys():
    torch.manual_seed(0)
    op = create_op("anchor_window", 8, 2, window=3, pool=4, train_keys=4608)
    plain = create_op("anchor_window", 8, 2, window=3, pool=4)
    plain.load_state_dict(op.state_dict())
    # 9 tokens of a window and 4 anchors; queries absorb the factor
    plain.qkv.weight.data[:8] *= math.sqrt(math.log(13) / math.log(4608))
    plain.qkv.bias.data[:8] *= math.sqrt(math.log(13) / math.log(4608))
    x = torch.randn(1, 8, 6, 8)
    assert torch.allclose(op(x), plain(x), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "grid"}, "form must be 'sliding' or 'block', not 'grid'"),
        ({"anchors": "some"}, "anchors must be 'all' or 'local', not 'some'"),
        ({"window": 4, "shift": 4}, "shift must be from 0 to 3, not 4"),
        ({"train_keys": 1}, "train_keys must be at least 2, not 1"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_op("anchor_window", 8, 2, **arguments)
