"""Statistics of feature maps, by their definitions and on maps with known answers."""

import math

import numpy as np
import pytest
import torch

from retinue.evaluation.sight.features import (
    MinibatchCKA,
    effective_rank,
    high_frequency_share,
    hsic,
    principal_colours,
    relative_amplitude,
    token_similarity,
)


def cka(first: torch.Tensor, second: torch.Tensor, batch: int = 64) -> float:
    total = MinibatchCKA()
    for a, b in zip(first.split(batch), second.split(batch), strict=True):
        total.add([a], [b])
    return float(total.result()[0, 0])


def test_cka_ignores_rotation_and_scale_and_finds_independence():
    torch.manual_seed(0)
    x = torch.randn(128, 512).double()
    rotation = torch.linalg.qr(torch.randn(512, 512).double())[0]
    assert cka(x, x @ rotation) == pytest.approx(1, abs=1e-9)
    assert cka(x, 3 * x) == pytest.approx(1, abs=1e-9)
    # The biased estimate of independent features of so many channels would be about 0.9.
    assert abs(cka(x, torch.randn(128, 512))) < 0.1
    assert cka(x, x * torch.tensor([1.0] * 64 + [0.0] * 448)) < 0.9


def test_hsic_is_its_definition():
    torch.manual_seed(0)
    n = 7
    k, m = ((t @ t.T).fill_diagonal_(0) for t in torch.randn(2, n, 3).double())
    # Mean of the U-statistic's terms over different indices (Song et al., 2012, equation 4)
    pairs = sum(k[i, j] * m[i, j] for i in range(n) for j in range(n)) / (n * (n - 1))
    index = range(n)
    quads = [k[i, j] * m[q, r] for i in index for j in index for q in index for r in index if len({i, j, q, r}) == 4]
    triples = [k[i, j] * m[i, q] for i in index for j in index for q in index if len({i, j, q}) == 3]
    expected = pairs + sum(quads) / len(quads) - 2 * sum(triples) / len(triples)
    assert float(hsic(k, m)) == pytest.approx(float(expected), rel=1e-10)


def test_cka_between_layers_and_of_too_few_images():
    torch.manual_seed(0)
    layers = [torch.randn(16, 5), torch.randn(16, 2, 2, 3)]
    total = MinibatchCKA()
    total.add(layers, layers)
    matrix = total.result()
    assert matrix.shape == (2, 2) and np.allclose(np.diag(matrix), 1) and np.allclose(matrix, matrix.T)
    with pytest.raises(ValueError, match="at least 4 images, not 3"):
        MinibatchCKA().add([torch.randn(3, 5)], [torch.randn(3, 5)])


def test_principal_components_are_the_directions_of_variance():
    torch.manual_seed(0)
    scores = torch.randn(2, 8, 8, 3) * torch.tensor([9.0, 3.0, 1.0])
    directions = torch.linalg.qr(torch.randn(6, 6))[0][:3]
    colours, shares = principal_colours(scores @ directions)
    assert colours.shape == (2, 8, 8, 3) and colours.min() == 0 and colours.max() == 1
    for i in range(3):
        # All but the outermost per cents are linear in the scores.
        assert abs(np.corrcoef(colours[..., i].ravel(), scores[..., i].flatten().numpy())[0, 1]) > 0.95
    assert shares.sum() == pytest.approx(1) and shares[0] > 0.8
    assert principal_colours(torch.randn(1, 2, 2, 2))[0].shape == (1, 2, 2, 3)


def test_frequencies():
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    board, wave = (-1.0) ** (x + y), torch.cos(2 * math.pi * x / 8)
    as_map = lambda t: t[None, :, :, None]  # noqa: E731
    assert high_frequency_share(as_map(5 + board)) == pytest.approx(1)
    assert high_frequency_share(as_map(5 + wave)) == pytest.approx(0, abs=1e-12)
    # Energies are proportional to the squares: 1 for the board, 1/2 for the wave.
    assert high_frequency_share(as_map(5 + board + wave)) == pytest.approx(2 / 3)
    assert relative_amplitude(as_map(10 + board)) == pytest.approx(-1)
    assert math.isnan(high_frequency_share(torch.ones(1, 8, 8, 1)))
    assert math.isnan(high_frequency_share(torch.randn(1, 2, 2, 3)))


def test_similarity_and_rank():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 3, 5)
    pairs = [
        torch.cosine_similarity(a[i], a[j], dim=0)
        for a in x.flatten(1, 2)
        for i in range(9)
        for j in range(9)
        if i != j
    ]
    assert token_similarity(x) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-5)
    assert token_similarity(torch.ones(1, 2, 2, 4)) == pytest.approx(1)
    # The mean of these four tokens is 0, and they span two directions of equal size.
    cross = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]).view(1, 2, 2, 3)
    assert effective_rank(cross) == pytest.approx(2, rel=1e-4)
    assert effective_rank(torch.ones(1, 2, 2, 4)) == 1
    assert math.isnan(effective_rank(torch.ones(1, 1, 1, 4))) and math.isnan(token_similarity(torch.ones(1, 1, 1, 4)))
