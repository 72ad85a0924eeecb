"""Attention in overlapping patches: definition by loops, and special cases."""

import pytest
import torch

from ops import Place, create_op

X = torch.randn(2, 8, 13, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def overlapping_patch(**arguments):
    torch.manual_seed(0)
    return create_op("overlapping_patch", 12, 3, **arguments).double()


@pytest.mark.parametrize(
    ("patch", "overlap", "tops", "lefts"),
    [(4, 2, (0, 2, 4), (0, 2, 4, 6, 8, 9)), (5, 1, (0, 3), (0, 4, 8)), (10, 2, (0,), (0, 3)), (20, 2, (0,), (0,))],
)
def test_attends_as_defined(patch, overlap, tops, lefts):
    op = overlapping_patch(patch=patch, overlap=overlap, qk_dim=6)
    out, counts = torch.zeros_like(X), torch.zeros(8, 13, 1)
    for top in tops:
        for left in lefts:
            part = (slice(top, top + patch), slice(left, left + patch))
            counts[part] += 1
            for b in range(2):
                tokens = X[b][part].flatten(0, 1)
                q, k, v = op.q(tokens), op.k(tokens), op.v(tokens)
                for h in range(3):
                    qk, channels = slice(2 * h, 2 * h + 2), slice(4 * h, 4 * h + 4)
                    attended = (q[:, qk] @ k[:, qk].T / 2**0.5).softmax(-1) @ v[:, channels]
                    out[b][part][..., channels] += attended.view(*X[b][part].shape[:2], 4)
    assert torch.allclose(op(X), op.proj(out / counts), atol=1e-12)


def test_patches_without_overlap_are_windows():
    op, window = overlapping_patch(patch=4, overlap=0, qk_dim=12), create_op("plain_window", 12, 3, window=4).double()
    with torch.no_grad():
        window.qkv.weight.copy_(torch.cat([op.q.weight, op.k.weight, op.v.weight]))
        window.proj.weight.copy_(op.proj.weight)
        torch.nn.init.zeros_(window.qkv.bias)
        torch.nn.init.zeros_(window.proj.bias)
    x = X[:, :, :12]
    assert torch.allclose(op(x), window(x), atol=1e-12)


def test_patches_grow_over_four_blocks():
    assert [create_op("overlapping_patch", 12, 3, place=Place(block=b)).patch for b in range(5)] == [16, 20, 24, 28, 16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch": 2}, "overlap must be from 0 to patch - 1, not 2 for a patch of 2"),
        ({"overlap": -1}, "not -1 for a patch of 16"),
        ({"qk_dim": 7}, "qk_dim must be a multiple of 3, the number of heads, not 7"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        overlapping_patch(**arguments)
