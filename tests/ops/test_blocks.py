"""Blocks of a map, and attention to chosen blocks against masked dense attention."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ops import blocks
from ops.blocks import Blocks, block_attention, top_blocks


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_blocks_are_cut_averaged_and_joined():
    x = torch.arange(30.0).view(1, 5, 6, 1)
    cut = Blocks((5, 6), (2, 4))
    parts = cut.split(x, 1)
    assert cut.grid == (3, 2) and cut.number == 6 and cut.padded and parts.shape == (1, 1, 6, 8, 1)
    assert torch.equal(cut.join(parts), x)
    for m, (top, left) in enumerate((i, j) for i in (0, 2, 4) for j in (0, 4)):
        block = x[0, top : top + 2, left : left + 4, 0]
        assert torch.equal(parts[0, 0, m, :, 0][cut.real("cpu")[m]], block.flatten())
        assert torch.isclose(cut.means(parts)[0, 0, m, 0], block.mean())


def test_top_blocks_are_those_with_the_largest_scores():
    scores = torch.tensor([[0.1, 3.0, 2.0], [5.0, 4.0, 6.0]])
    assert top_blocks(scores, 2).tolist() == [[False, True, True], [True, False, True]]
    assert top_blocks(scores, 9).all()
    assert top_blocks(torch.zeros(40), 3).nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("queries", [1, 3, 8])
@pytest.mark.parametrize("kind", ["any", "count", "extra", "causal"])
def test_gathered_blocks_equal_masked_attention(monkeypatch, kind, queries):
    torch.manual_seed(0)
    groups, number, length = 24 // queries, 4, 6
    q, k, v = random(2, 3, groups, queries, 5), random(2, 3, number, length, 5), random(2, 3, number, length, 5)
    scores = torch.randn(2, 3, groups, number)
    chosen = top_blocks(scores, 2)
    if kind != "count":
        chosen = chosen | (scores > 1)
        chosen[:, :, 1] = True
    if kind == "causal":
        position = torch.arange(24).view(groups, queries)[:, :1] // length
        chosen = (chosen & (torch.arange(number) <= position)) | (torch.arange(number) == position)
    extra = (random(2, 3, 2, 5), random(2, 3, 2, 5)) if kind == "extra" else None
    real = None if kind == "causal" else torch.tensor([[True, *row] for row in torch.rand(number, length - 1) > 0.3])
    inputs = (q, k, v, *(extra or ()))

    def run(limit):
        monkeypatch.setattr(blocks, "MAX_MASKED_TOKENS", limit)
        out = block_attention(q, k, v, chosen, real, 2 if kind == "count" else None, kind == "causal", extra)
        return out, *torch.autograd.grad(out.sin().sum(), inputs)

    for ours, expected in zip(run(0), run(1000), strict=True):
        assert torch.allclose(ours, expected, atol=1e-12)


def test_large_scores_do_not_overflow(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(blocks, "MAX_MASKED_TOKENS", 0)
    q, k, v, extra_k = random(1, 1, 6, 1, 4), random(1, 1, 3, 4, 4), random(1, 1, 3, 4, 4), random(1, 1, 2, 4)
    chosen = top_blocks(torch.randn(1, 1, 6, 3), 2)
    for factors in ((5000, 1), (1, 5000)):
        out = block_attention(q, factors[0] * k, v, chosen, extra=(factors[1] * extra_k, v[:, :, 0, :2]))
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v, extra_k)))


def test_masked_attention_attends_to_the_chosen_blocks_only():
    torch.manual_seed(0)
    q, k, v = random(1, 1, 3, 2, 4), random(1, 1, 2, 3, 4), random(1, 1, 2, 3, 4)
    chosen = torch.tensor([[True, False], [True, True], [False, True]])
    out = block_attention(q, k, v, chosen)
    for g, keys in enumerate((slice(0, 3), slice(0, 6), slice(3, 6))):
        kept_k, kept_v = k.flatten(2, 3)[0, 0, keys], v.flatten(2, 3)[0, 0, keys]
        assert torch.allclose(out[0, 0, g], (q[0, 0, g] @ kept_k.T / 2).softmax(-1) @ kept_v, atol=1e-12)


def test_cost_follows_the_number_of_chosen_blocks():
    def flops(count):
        q = torch.empty(1, 2, 64, 49, 16, device="meta")
        chosen = torch.empty(1, 2, 64, 64, dtype=torch.bool, device="meta")
        with FlopCounterMode(display=False) as counter:
            block_attention(q, q, q, chosen, count=count)
        return counter.get_total_flops()

    assert flops(4) == 4 * 2 * 64 * 49 * 49 * 2 * 16 * 2 == flops(64) // 16 == flops(None) // 16
