"""Proxy-token attention: definition by loops, and special cases."""

import math
from itertools import pairwise

import pytest
import torch

from ops import Place, create_op

X = torch.randn(2, 5, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def proxy_token(**arguments):
    torch.manual_seed(0)
    return create_op("proxy_token", 12, 3, **arguments).double()


def attend(q, k, v):
    """Return multi-head attention of queries (N, 12) to keys and values (M, 12)."""
    heads = [slice(4 * h, 4 * h + 4) for h in range(3)]
    return torch.cat([(q[:, h] @ k[:, h].T / 2).softmax(-1) @ v[:, h] for h in heads], dim=-1)


def global_part(op, x, side):
    H, W = x.shape[:2]
    windows = [x[r : r + side, c : c + side].flatten(0, 1) for r in range(0, H, side) for c in range(0, W, side)]
    proxies = torch.stack([window.mean(0) for window in windows])
    proxies = op.proxy_proj(attend(*op.proxy_qkv(proxies).chunk(3, -1)))
    return op.out(op.cross_proj(attend(op.cross_q(x.flatten(0, 1)), *op.cross_kv(proxies).chunk(2, -1)))).view_as(x)


@pytest.mark.parametrize("shift", [0, 1])
def test_mixes_as_defined(shift):
    op = proxy_token(window=3, shift=shift)
    for x, out in zip(X, op(X), strict=True):
        # The local part attends to zeros outside the map, 6 x 9 tokens in all
        padded = torch.zeros(6, 9, 12, dtype=torch.float64)
        padded[:5, :8] = x
        q, k, v = op.local_qkv(padded).chunk(3, -1)
        local = torch.zeros_like(padded)
        rows, columns = ([0, shift, *range(3 + shift, n, 3), n] if shift else range(0, n + 1, 3) for n in (6, 9))
        for top, bottom in pairwise(rows):
            for left, right in pairwise(columns):
                part = (slice(top, bottom), slice(left, right))
                attended = attend(*(t[part].flatten(0, 1) for t in (q, k, v)))
                local[part] = attended.view(bottom - top, right - left, 12)
        expected = global_part(op, x, 3) + op.local_proj(local)[:5, :8]
        assert torch.allclose(out, expected, atol=1e-12)


def test_the_global_part_alone():
    op = proxy_token(window=3, local=False)
    assert torch.allclose(op(X), torch.stack([global_part(op, x, 3) for x in X]), atol=1e-12)
    # With one proxy, all tokens get the same
    op = proxy_token(window=8, local=False)
    assert torch.allclose(op(X), op(X)[:, :1, :1].expand_as(X), atol=1e-12)


def test_a_zero_projection_leaves_window_attention():
    op, window = proxy_token(window=4, zero_init=True), create_op("plain_window", 12, 3, window=4).double()
    window.qkv, window.proj = op.local_qkv, op.local_proj
    assert torch.allclose(op(X), window(X), atol=1e-12)


def test_defaults_follow_stage_and_block():
    ops = [create_op("proxy_token", 12, 3, place=Place(stage, block)) for stage in range(5) for block in range(2)]
    assert [(op.window, op.shift) for op in ops] == [
        (7, 0), (7, 3), (7, 0), (7, 3), (4, 0), (4, 2), (2, 0), (2, 1), (2, 0), (2, 1)
    ]  # fmt: skip


def test_number_of_parameters_is_the_papers():
    weights = {name: p.numel() / 144 for name, p in proxy_token().named_parameters() if p.ndim == 2}
    assert sum(weights.values()) == 4 + 4 + 1 + 4 and math.isclose(weights["out.weight"], 1)


@pytest.mark.parametrize("arguments", [{"window": 0}, {"window": 4, "shift": 4}, {"shift": -1}])
def test_wrong_values_are_refused(arguments):
    with pytest.raises(ValueError, match="window must be at least 1 and shift from 0 to window - 1"):
        proxy_token(**arguments)
