"""Multi-scale attention fusion equals its definition, written as loops, and its weights fit other sizes."""

import math

import pytest
import torch

from ops import create_op
from ops.attention.multi_scale_fusion import resize_joint_weights, resize_weights


def build(**kwargs):
    """Build an op in float64 whose weights are random."""
    torch.manual_seed(0)
    op = create_op("multi_scale_fusion", 6, 2, window=2, **kwargs).double()
    for parameter in op.parameters():
        torch.nn.init.normal_(parameter)
    return op


@pytest.mark.parametrize("separable", [True, False])
def test_window_attention_attends_to_a_weighted_sum_of_all_tokens(separable):
    op = build(size=(4, 6), separable=separable)
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    # ⌈4 / √2⌉ and ⌈6 / √2⌉
    h, w = 3, 5
    reduced = []
    for i in range(h):
        for j in range(w):
            token = op.pos_embed[0, :, i, j]
            for row in range(4):
                for column in range(6):
                    weight = op.rows[i, row] * op.columns[j, column] if separable else op.weight[i, j, row, column]
                    token = token + weight * x[0, row, column]
            reduced.append(op.norm_kv(token))
    local = op.local(x)
    k, v = op.kv(torch.stack(reduced)).chunk(2, dim=-1)
    out = torch.zeros_like(x)
    for i in range(4):
        for j in range(6):
            q = op.q(op.norm_q(local[0, i, j]))
            heads = [(k[:, s] @ q[s] / math.sqrt(3)).softmax(0) @ v[:, s] for s in (slice(0, 3), slice(3, 6))]
            out[0, i, j] = local[0, i, j] + op.proj(torch.cat(heads))
    assert torch.allclose(op(x), out, atol=1e-12)


def test_joint_weights_that_are_a_product_equal_separable_weights():
    op = build(size=(4, 6))
    joint = build(size=(4, 6), separable=False)
    state = op.state_dict() | {"weight": torch.einsum("hH,wW->hwHW", op.rows, op.columns)}
    joint.load_state_dict({key: value for key, value in state.items() if key not in ("rows", "columns")})
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert torch.allclose(op(x), joint(x), atol=1e-12)


@pytest.mark.parametrize("size", [(3, 5), (4, 6), (9, 13)], ids=str)
def test_a_constant_map_stays_constant_at_any_size(size):
    """Untrained weights average, and interpolated weights have the same sums."""
    for separable in (True, False):
        op = create_op("multi_scale_fusion", 6, 2, size=(4, 6), separable=separable)
        torch.nn.init.zeros_(op.pos_embed)
        reduced = op.downsample(torch.ones(1, *size, 6))
        assert reduced.shape == (1, *op.grid(*size), 6)
        assert torch.allclose(reduced, torch.ones(()), atol=0.25)


def test_weights_for_their_own_size_are_unchanged():
    rows, joint = torch.randn(3, 4), torch.randn(2, 3, 4, 5)
    assert resize_weights(rows, 3, 4) is rows and resize_joint_weights(joint, (2, 3), (4, 5)) is joint
    with pytest.raises(ValueError, match=r"ratio must be above 0 and at most 1, not 1\.5"):
        create_op("multi_scale_fusion", 8, 2, ratio=1.5)
