"""Figures of manipulation localisation equal their definitions, and their intervals cover."""

import numpy as np
import pytest
import torch

from retinue.evaluation.manipulation import pixel_auc, pixel_f1, summarize
from retinue.evaluation.segmentation import areas, confusion_matrix


def images(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return scores with ties and masks of images; a tenth of the pixels is ignored."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        mask = (rng.random((9, 11)) < rng.uniform(0.2, 0.6)).astype(np.uint8)
        scores = np.round(mask + rng.normal(0, 1.2, mask.shape), 1)
        pairs.append((scores, np.where(rng.random(mask.shape) < 0.1, 255, mask)))
    return pairs


def figures(pairs: list[tuple[np.ndarray, np.ndarray]], **options: int) -> dict:
    tables = [areas(confusion_matrix(torch.from_numpy(s > 0.5), torch.from_numpy(m), 2).numpy()) for s, m in pairs]
    return summarize(np.stack(tables), np.array([pixel_auc(s, m) for s, m in pairs]), **options)


def test_figures_are_what_their_definitions_say():
    f1s, aucs, pairs = [], [], images(6)
    for scores, mask in pairs:
        pixels = [(score, label) for score, label in zip(scores.flat, mask.flat, strict=True) if label != 255]
        true = [score for score, label in pixels if label]
        false = [score for score, label in pixels if not label]
        precision = sum(score > 0.5 for score in true) / sum(score > 0.5 for score, _ in pixels)
        recall = sum(score > 0.5 for score in true) / len(true)
        f1s.append(2 * precision * recall / (precision + recall))
        wins = sum((a > b) + 0.5 * (a == b) for a in true for b in false)
        aucs.append(wins / (len(true) * len(false)))
        assert pixel_auc(scores, mask) == pytest.approx(aucs[-1])
    summary = figures(pairs)
    assert summary["pixel_f1"] == pytest.approx(np.mean(f1s)) and summary["pixel_auc"] == pytest.approx(np.mean(aucs))
    for name, values in (("pixel_f1", f1s), ("pixel_auc", aucs)):
        low, high = summary[f"{name}_ci95"]
        assert min(values) <= low < summary[name] < high <= max(values)
        assert name in summary["ci_methods"]


def test_perfect_and_worst_predictions():
    _, mask = images(1)[0]
    signs = 2.0 * (mask == 1) - 1
    assert pixel_auc(signs, mask) == 1 and pixel_auc(-signs, mask) == 0 and pixel_auc(0 * signs, mask) == 0.5
    # Differences far beyond what float32 probabilities can tell apart.
    assert pixel_auc((1000 + signs).astype(np.float32), mask) == 1
    summary = figures([(signs, mask)])
    assert summary["pixel_f1"] == 1 and summary["pixel_f1_ci95"] is None


def test_authentic_images_do_not_count():
    pairs = images(4)
    authentic = [(scores, np.where(mask == 1, 0, mask)) for scores, mask in images(2, seed=1)]
    assert np.isnan(pixel_auc(*authentic[0]))
    assert figures(pairs + authentic) == figures(pairs)
    assert figures(authentic) == {"ci_methods": {}}
    # An image of manipulated pixels only has an F1 and no area under the curve.
    scores, mask = pairs[0]
    assert list(figures([(scores, np.ones_like(mask))])) == ["pixel_f1", "pixel_f1_ci95", "ci_methods"]


def test_intervals_cover_the_true_value_often_enough():
    rng, covered = np.random.default_rng(0), 0
    nothing_manipulated = np.zeros((25, 3, 2))
    for _ in range(100):
        low, high = summarize(nothing_manipulated, rng.beta(4, 1, 25), resamples=200)["pixel_auc_ci95"]
        # The mean of this distribution is 4 / 5.
        covered += low <= 0.8 <= high
    assert covered > 85


def test_f1_counts_false_alarms_of_manipulated_images():
    table = np.array([[[90, 5], [92, 8], [95, 7]]])
    assert pixel_f1(table) == pytest.approx(2 * 5 / (8 + 7))
