"""Attention inside regions: definition by loops, special cases, and the regions that stand in for given ones."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import normalize

from ops import Place, create_op
from ops.regions import superpixels

X = torch.randn(2, 6, 9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def region(num_heads=3, **arguments):
    torch.manual_seed(0)
    return create_op("region", 12, num_heads, **arguments).double().eval()


def by_loops(op, labels):
    out = torch.zeros(2, 54, 12, dtype=torch.float64)
    for b, (qkv, own) in enumerate(zip(op.qkv(X).flatten(1, 2), labels.flatten(1).tolist(), strict=True)):
        for i in range(54):
            keys = [j for j in range(54) if own[j] == own[i]]
            for h in range(3):
                q, k, v = (slice(12 * t + 4 * h, 12 * t + 4 * h + 4) for t in range(3))
                weights = (qkv[keys][:, k] @ qkv[i, q] / math.sqrt(3)).softmax(0)
                out[b, i, 4 * h : 4 * h + 4] = weights @ qkv[keys][:, v]
    return op.proj(out).view_as(X)


def test_attends_as_defined():
    # Sizes of 1 to 30 tokens, numbers with gaps, and other regions in the second image
    labels = torch.stack([torch.arange(54).pow(2).div(500, rounding_mode="floor"), torch.arange(54) % 4 * 7])
    labels = labels.view(2, 6, 9)
    op = region()
    assert torch.allclose(op(X, labels), by_loops(op, labels), atol=1e-12)
    assert torch.allclose(op(X, labels[1])[1], op(X, labels)[1], atol=1e-12)
    large = labels.repeat_interleave(3, 1).repeat_interleave(2, 2)
    assert torch.equal(op(X, large), op(X, labels))
    own = superpixels(X, 8, 5, 1.0)
    assert torch.allclose(op(X), by_loops(op, own), atol=1e-12)


def test_one_region_is_full_attention_and_cells_are_windows():
    # Scales agree where there are as many heads as channels of a head
    torch.manual_seed(0)
    op, x = create_op("region", 16, 4, grid=1).double(), torch.randn(2, 8, 12, 16, dtype=torch.float64)
    full, window = (create_op(name, 16, 4).double() for name in ("full", "plain_window"))
    for other in (full, window):
        other.load_state_dict(op.state_dict())
    assert torch.allclose(op(x), full(x), atol=1e-12)
    window.window = 4
    rows, columns = torch.arange(8)[:, None] // 4, torch.arange(12) // 4
    assert torch.allclose(op(x, rows * 3 + columns), window(x), atol=1e-12)


def test_superpixels_are_k_means_over_features_and_positions():
    x = X[:, :4, :6]
    positions = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij"), dim=-1)
    features = [torch.cat([normalize(image, dim=-1), 0.7 * positions / math.sqrt(6)], dim=-1) for image in x]
    for b, image in enumerate(features):
        means = [image[r : r + 2, c : c + 3].flatten(0, 1).mean(0) for r in (0, 2) for c in (0, 3)]
        for step in range(4):
            labels = [min(range(4), key=lambda m: (token - means[m]).norm().item()) for token in image.flatten(0, 1)]
            assert superpixels(x, 2, step, 0.7)[b].tolist() == labels
            for m in range(4):
                members = [t for t, label in zip(image.flatten(0, 1), labels, strict=True) if label == m]
                means[m] = torch.stack(members).mean(0) if members else means[m]
    cells = torch.arange(4)[:, None] // 2 * 2 + torch.arange(6) // 3
    assert torch.equal(superpixels(x, 2, 3, 1e3)[0].view(4, 6), cells)


def test_centers_follow_the_batches_and_choose_the_regions():
    op = region(source="centers", grid=2).train()
    out = op(X)
    assert op.centers.initted and torch.allclose(out, op.eval()(X))
    nearest = (normalize(X.flatten(1, 2), dim=-1) @ normalize(op.centers.means, dim=-1).T).argmax(-1)
    assert nearest.unique().numel() == 4
    assert torch.allclose(out, by_loops(op, nearest), atol=1e-12)
    before = op.centers.means.clone()
    op.train()(X.roll(1, dims=-1)).sum().backward()
    assert not torch.equal(op.centers.means, before)


def test_grids_follow_the_stage():
    assert [create_op("region", 12, 3, place=Place(stage)).grid for stage in range(5)] == [8, 4, 2, 1, 1]


def test_scores_are_at_most_four_times_those_of_the_regions(monkeypatch):
    computed, attention = [], F.scaled_dot_product_attention

    def count(q, k, v, **arguments):
        computed.append(q[:, 0, :, 0].numel() * k.shape[2])
        return attention(q, k, v, **arguments)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    labels = torch.arange(54).pow(2).div(500, rounding_mode="floor").view(6, 9)
    region()(X, labels)
    needed = 2 * labels.unique(return_counts=True)[1].square().sum().item()
    assert needed <= sum(computed) < 4 * needed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "superpixel"}, "source must be superpixels or centers, not 'superpixel'"),
        ({"grid": 0}, "grid must be at least 1"),
        ({"compactness": -1}, "steps and compactness at least 0"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        region(**arguments)
