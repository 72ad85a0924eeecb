"""Fusion-window attention equals its definition, and other ops in special cases."""

import math

import pytest
import torch

from ops import Place, create_op
from ops.attention import saliency_window


def shares_and_saliency(op, q, k, window_of):
    """Return the share of each window's attention that each window receives, and the attention of each token.

    Args:
        op: The op.
        q: Queries of the tokens, (N, heads, D).
        k: Keys of the tokens, (N, heads, D).
        window_of: The window of each token.
    """
    attention = torch.einsum("ihd,jhd->hij", q, k).div(math.sqrt(q.shape[-1])).softmax(-1).mean(0)
    windows = sorted(set(window_of))
    shares = {}
    for a in windows:
        rows = [i for i, window in enumerate(window_of) if window == a]
        for b in windows:
            columns = [j for j, window in enumerate(window_of) if window == b]
            shares[a, b] = sum(attention[i, j] for i in rows for j in columns) / len(rows)
    return shares, attention.sum(0)


@pytest.mark.parametrize(
    ("size", "block", "own"), [((6, 9), 0, False), ((7, 8), 0, True), ((7, 8), 1, False), ((3, 7), 1, False)]
)
def test_tokens_attend_to_their_window_and_to_the_chosen_windows(size, block, own, monkeypatch):
    torch.manual_seed(0)
    # One window at a time
    monkeypatch.setattr(saliency_window, "MAX_SCORES", 1)
    op = create_op("saliency_window", 8, 2, window=3, topk=2, own=own, place=Place(block=block)).double()
    # Large scores, so that rounding decides no choice
    op.qkv.weight.data.mul_(4)
    x = torch.randn(1, *size, 8, dtype=torch.float64)
    q, k, v = op.qkv(x)[0].flatten(0, 1).unflatten(-1, (3, 2, 4)).unbind(1)
    tokens = [(i, j) for i in range(size[0]) for j in range(size[1])]
    shift = [1 if block and n > 3 else 0 for n in size]
    padded = [math.ceil(n / 3) * 3 for n in size]
    window_of = [tuple((t - s) % n // 3 for t, s, n in zip(token, shift, padded, strict=True)) for token in tokens]
    wrapped = [tuple(t < s for t, s in zip(token, shift, strict=True)) for token in tokens]
    shares, saliency = shares_and_saliency(op, q, k, window_of)
    table = op.position.relative_position_bias_table

    def attend(query, keys, bias):
        scores = (k[keys] * query).sum(-1) / 2 + bias
        return (scores.softmax(0).unsqueeze(-1) * v[keys]).sum(0).flatten()

    out = torch.zeros_like(x[0])
    for n, (i, j) in enumerate(tokens):
        inside = [m for m in range(len(tokens)) if (window_of[m], wrapped[m]) == (window_of[n], wrapped[n])]
        bias = torch.stack([table[(i - tokens[m][0] + 2) * 5 + j - tokens[m][1] + 2] for m in inside])
        others = [w for w in set(window_of) if own or w != window_of[n]]
        chosen = sorted(others, key=lambda w, row=window_of[n]: -shares[row, w])[:2]
        across = [m for m in range(len(tokens)) if window_of[m] in chosen]
        out[i, j] = op.proj(attend(q[n], inside, bias) + attend(q[n], across, 0))
    assert torch.allclose(op(x)[0], out, atol=1e-12)
    assert torch.allclose(op.saliency(x).flatten(), saliency, atol=1e-12)
    assert op.saliency(x).sum().item() == pytest.approx(len(tokens))


@pytest.mark.parametrize("size", [(6, 9), (5, 8)])
def test_with_all_windows_it_is_window_attention_plus_full_attention(size):
    torch.manual_seed(0)
    op, full = create_op("saliency_window", 8, 2, window=3, topk=9, bias=False), create_op("full", 8, 2)
    one = create_op("saliency_window", 8, 2, window=9, bias=False)
    full.load_state_dict(op.state_dict())
    one.load_state_dict(op.state_dict())
    for module in (op, full, one):
        module.proj.bias.data.zero_()
    x = torch.randn(2, *size, 8)
    assert torch.allclose(one(x), 2 * full(x), atol=1e-5)
    if size == (6, 9):
        plain = create_op("plain_window", 8, 2, window=3)
        plain.load_state_dict(op.state_dict())
        assert torch.allclose(op(x), plain(x) + full(x), atol=1e-5)


@pytest.mark.parametrize("size", [(6, 9), (7, 8)])
def test_ranking_by_means_is_exact_where_windows_hold_equal_tokens(size):
    torch.manual_seed(0)
    exact = create_op("saliency_window", 8, 2, window=3, topk=1, bias=False)
    pooled = create_op("saliency_window", 8, 2, window=3, topk=1, bias=False, select="pooled")
    pooled.load_state_dict(exact.state_dict())
    x = torch.randn(1, 3, 3, 8).repeat_interleave(3, 1).repeat_interleave(3, 2)[:, : size[0], : size[1]]
    assert torch.allclose(exact.saliency(x), pooled.saliency(x), atol=1e-5)
    x[:] += 1e-3 * torch.randn(x.shape)
    assert torch.allclose(exact(x), pooled(x), atol=1e-5)


def test_permuted_windows_give_permuted_outputs():
    torch.manual_seed(0)
    op = create_op("saliency_window", 8, 2, window=2, topk=2, bias=False)
    windows = torch.randn(6, 2, 2, 8)

    def join(order):
        return windows[order].unflatten(0, (2, 3)).permute(0, 2, 1, 3, 4).reshape(1, 4, 6, 8)

    order = torch.randperm(6)
    out = op(join(torch.arange(6)))[0].unflatten(1, (3, 2)).unflatten(0, (2, 2)).transpose(1, 2).flatten(0, 1)
    permuted = op(join(order))[0].unflatten(1, (3, 2)).unflatten(0, (2, 2)).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(out[order], permuted, atol=1e-6)


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match="select must be 'exact' or 'pooled', not 'mean'"):
        create_op("saliency_window", 8, 2, select="mean")
    with pytest.raises(ValueError, match="topk must be at least 1, not 0"):
        create_op("saliency_window", 8, 2, topk=0)
