"""Radial attention: its pattern by the rule for pairs of tokens, and bands against masked attention."""

import itertools

import pytest
import torch

from ops import create_op, offsets
from ops.offsets import offset_mask

X = torch.randn(2, 9, 7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EXTRA = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CASES = (
    {},
    {"min_width": 2},
    {"decay": 0.4},
    {"symmetric": True, "min_width": 3},
    {"sink": True},
    {"sink": True, "symmetric": True},
)


def radial(**arguments):
    torch.manual_seed(0)
    return create_op("radial", dim=8, num_heads=2, **arguments).double()


def is_attended(frames, tokens, length, min_width, decay):
    """Apply the paper's rule to two frames i and j, and two tokens a and b, of frames of `length` tokens."""
    (i, j), (a, b) = frames, tokens
    delta, digits = abs(i - j), length.bit_length()
    group = len(bin(delta)) - 2 if delta else 0
    decayed = 2**digits / 2**group
    width = length if delta <= 1 else max(decayed * decay, min_width)
    kept = decayed >= min_width or delta % int(min_width / decayed) == 0
    return kept and abs(a - b) <= width


@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_attends_as_defined(monkeypatch, arguments):
    op, (H, W) = radial(**arguments), X.shape[1:3]
    rule = (arguments.get("min_width", 1), arguments.get("decay", 1))
    mask = torch.zeros(H * W, H * W, dtype=torch.bool)
    for (y, x), (b, a) in itertools.product(itertools.product(range(H), range(W)), repeat=2):
        kept = is_attended((y, b), (x, a), W, *rule)
        if "symmetric" in arguments:
            kept = kept or is_attended((x, a), (y, b), H, *rule)
        mask[y * W + x, b * W + a] = kept or ("sink" in arguments and b == 0)
    q, k, v = (t.flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2) for t in op.qkv(X).chunk(3, dim=-1))
    extra_k, extra_v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in op.qkv(EXTRA).chunk(3, dim=-1)[1:])
    for extra in (None, EXTRA):
        scores = (q @ k.transpose(-2, -1) / 2).masked_fill(~mask, -torch.inf)
        values = v
        if extra is not None:
            scores = torch.cat([scores, q @ extra_k.transpose(-2, -1) / 2], dim=-1)
            values = torch.cat([v, extra_v], dim=2)
        expected = op.proj((scores.softmax(-1) @ values).transpose(1, 2).flatten(2)).unflatten(1, (H, W))
        for limit in (0, 1000):
            monkeypatch.setattr(offsets, "MAX_MASKED_TOKENS", limit)
            out = op(X) if extra is None else op(X, extra)[0]
            assert torch.allclose(out, expected, atol=1e-12)


def test_bands_of_large_maps_equal_masked_attention(monkeypatch):
    op, x = radial(), torch.randn(1, 17, 40, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for limit in (0, 1000):
        monkeypatch.setattr(offsets, "MAX_MASKED_TOKENS", limit)
        out = op(x)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (x, *op.parameters()))))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*results, strict=True))


def test_windows_halve_when_the_distance_doubles():
    assert radial().reach(56, 56) == [55, 55, *[16] * 2, *[8] * 4, *[4] * 8, *[2] * 16, *[1] * 24]
    # Windows of 2 tokens and less are widened to 4, in every second, fourth or eighth row
    assert radial(min_width=4).reach(16, 14) == [13, 13, 4, 4, 4, -1, 4, -1, 4, -1, -1, -1, 4, -1, -1, -1]


def test_number_of_keys_and_symmetry():
    mask = offset_mask(radial().pattern(56, 56, "cpu")[0], (56, 56)).view(56, 56, 56, 56)
    # Distances of 0, 1, 2, 4, 8, 16 and 28 rows
    assert mask[28, 28].sum(-1)[[28, 27, 26, 24, 20, 12, 0]].tolist() == [56, 56, 33, 17, 9, 5, 5]
    mask = offset_mask(radial(symmetric=True).pattern(12, 12, "cpu")[0], (12, 12)).view(12, 12, 12, 12)
    assert torch.equal(mask, mask.permute(1, 0, 3, 2)) and torch.equal(mask, mask.permute(2, 3, 0, 1))


@pytest.mark.parametrize("size", [(1, 6), (2, 9)], ids=str)
def test_few_rows_give_full_attention(size):
    op, full = radial(), create_op("full", dim=8, num_heads=2).double()
    full.load_state_dict(op.state_dict())
    x = torch.randn(1, *size, 8, dtype=torch.float64)
    assert torch.allclose(op(x), full(x), atol=1e-12)


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match="min_width must be at least 1 and decay positive, not 0 and 1"):
        radial(min_width=0)
