"""Attention with decomposed relative positions: its definition, windows, and maps of another size."""

import pytest
import torch
import torch.nn.functional as F

from ops import create_op
from ops.attention.decomposed_position import resize_offsets


def build(dim=8, heads=2, **arguments):
    torch.manual_seed(0)
    op = create_op("decomposed_position", dim, heads, **arguments).double()
    for table in (op.rel_pos_h, op.rel_pos_w):
        torch.nn.init.normal_(table)
    return op


def attend(op, x):
    """Attend to all tokens of one map (H, W, C), token by token."""
    H, W, C = x.shape
    q, k, v = op.qkv(x).unflatten(-1, (3, op.num_heads, -1)).unbind(2)
    out = torch.zeros(H, W, C, dtype=x.dtype)
    for i in range(H):
        for j in range(W):
            heads = []
            for n in range(op.num_heads):
                scores = torch.stack(
                    [
                        q[i, j, n] @ k[a, b, n] / q.shape[-1] ** 0.5
                        + q[i, j, n] @ op.rel_pos_h[i - a + H - 1]
                        + q[i, j, n] @ op.rel_pos_w[j - b + W - 1]
                        for a in range(H)
                        for b in range(W)
                    ]
                )
                heads.append(scores.softmax(0) @ v[:, :, n].flatten(0, 1))
            out[i, j] = torch.cat(heads)
    return op.proj(out)


def test_attends_to_the_map_as_defined():
    op, x = build(size=(3, 4)), torch.randn(2, 3, 4, 8, dtype=torch.float64)
    assert torch.allclose(op(x), torch.stack([attend(op, image) for image in x]), atol=1e-12)


def test_attends_in_padded_windows_as_defined():
    op, x = build(window=3), torch.randn(1, 3, 5, 8, dtype=torch.float64)
    padded = F.pad(x[0], (0, 0, 0, 1))
    expected = torch.cat([attend(op, padded[:, :3]), attend(op, padded[:, 3:])], dim=1)[:, :5]
    assert torch.allclose(op(x)[0], expected, atol=1e-12)


def test_offsets_are_interpolated_for_another_size():
    op, x = build(size=4), torch.randn(1, 6, 3, 8, dtype=torch.float64)
    other = build(size=(6, 3))
    tables = {name: other.resize_table(name, op.get_parameter(name)) for name in ("rel_pos_h", "rel_pos_w")}
    other.load_state_dict({**op.state_dict(), **tables})
    assert torch.allclose(op(x), other(x), atol=1e-12)
    assert torch.equal(resize_offsets(torch.arange(9.0)[:, None], 2).flatten(), torch.tensor([1.0, 4.0, 7.0]))


def test_fresh_offsets_change_nothing():
    op = create_op("decomposed_position", 8, 2, size=3)
    full = create_op("full", 8, 2)
    full.load_state_dict({name: value for name, value in op.state_dict().items() if "rel_pos" not in name})
    x = torch.randn(2, 3, 5, 8)
    assert torch.allclose(op(x), full(x), atol=1e-6)


@pytest.mark.parametrize("arguments", [{"window": -1}, {"size": 0}])
def test_wrong_values_are_refused(arguments):
    with pytest.raises(ValueError, match="window must be at least 0 and size at least 1"):
        build(**arguments)
