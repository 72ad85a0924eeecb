"""Figures of medical segmentation equal their definitions, compared pixel by pixel."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from retinue.evaluation.medical import FIGURES, add_medical_figures, hd95, image_distances, image_rates
from retinue.evaluation.segmentation import PixelCounts, areas, confusion_matrix, summarize

K = 4
NAMES = ("background", "organ", "lesion", "vessel")


def pairs(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return predictions and masks of different sizes; vessels never occur, and lesions in some images only."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(count):
        size = (9 + i % 3, 14)
        mask = rng.choice(3 if i % 2 else 2, size).repeat(2, 0).repeat(2, 1)
        prediction = np.where(rng.random(mask.shape) < 0.8, mask, rng.choice(3 if i % 3 else 2, mask.shape))
        mask[rng.random(mask.shape) < 0.1] = 255
        images.append((prediction, mask))
    return images


def count(images: list[tuple[np.ndarray, np.ndarray]], first: int = 0, spacing=None) -> PixelCounts:
    counts = PixelCounts(K)
    for index, (prediction, mask) in enumerate(images, first):
        confusion = confusion_matrix(torch.from_numpy(prediction), torch.from_numpy(mask), K).numpy()
        counts.add(index, confusion, image_distances(prediction, mask, K, spacing))
    return counts


def summarized(counts: PixelCounts, background: int | None = 0, **options) -> dict:
    summary = summarize(counts, NAMES, **options)
    add_medical_figures(summary, counts, NAMES, background, "px", **options)
    return json.loads(json.dumps(summary, allow_nan=False))


def border(region: np.ndarray) -> np.ndarray:
    """Return the pixels (N, 2) of a region beside a pixel outside it, by comparing neighbours one by one."""
    H, W = region.shape

    def outside(y: int, x: int) -> bool:
        return not (0 <= y < H and 0 <= x < W and region[y, x])

    steps = ((-1, 0), (1, 0), (0, -1), (0, 1))
    places = zip(*np.nonzero(region), strict=True)
    return np.array([(y, x) for y, x in places if any(outside(y + dy, x + dx) for dy, dx in steps)])


def expected_figures(prediction: np.ndarray, mask: np.ndarray, label: int, spacing=(1.0, 1.0)) -> list[float]:
    """Compute the figures of one class in one image by their definitions, in the order of `FIGURES`."""
    counted = mask != 255
    p, t = (prediction == label) & counted, (mask == label) & counted
    tp, fp, fn, tn = (int((a & b & counted).sum()) for a, b in ((p, t), (p, ~t), (~p, t), (~p, ~t)))
    ratios = ((2 * tp, 2 * tp + fp + fn), (tp, tp + fp + fn), (tp, tp + fn), (tn, tn + fp))
    rates = [part / whole if whole else math.nan for part, whole in ratios]
    if not p.any() or not t.any():
        diagonal = math.hypot(mask.shape[0] * spacing[0], mask.shape[1] * spacing[1])
        return [*rates, diagonal if p.any() or t.any() else math.nan]
    distances = cdist(border(p) * np.array(spacing), border(t) * np.array(spacing))
    return [*rates, max(np.percentile(distances.min(1), 95), np.percentile(distances.min(0), 95))]


@pytest.mark.parametrize("spacing", [None, (0.5, 1.25)])
def test_figures_of_an_image_equal_their_definitions(spacing):
    for prediction, mask in pairs(6):
        confusion = confusion_matrix(torch.from_numpy(prediction), torch.from_numpy(mask), K).numpy()
        ours = np.vstack([image_rates(areas(confusion)), image_distances(prediction, mask, K, spacing)])
        expected = [expected_figures(prediction, mask, label, *([spacing] if spacing else [])) for label in range(K)]
        np.testing.assert_allclose(ours.T, expected, rtol=1e-12)


def test_hd95_of_simple_regions():
    square, moved, point = (np.zeros((20, 30), bool) for _ in range(3))
    square[2:7, 3:8] = moved[2:7, 9:14] = point[19, 29] = True
    assert hd95(square, square) == 0
    # The left column of the square is 6 pixels from the left column of the moved square.
    assert hd95(square, moved) == hd95(moved, square) == pytest.approx(6)
    assert hd95(square, moved, (1.0, 0.5)) == pytest.approx(3)
    # All of the square's border is far from the point, whereas the point is near the corner.
    assert hd95(square, point) == pytest.approx(np.percentile(cdist(border(square), [[19, 29]]), 95))


def test_figures_are_means_over_images_and_then_over_classes_without_the_background():
    images = pairs(9)
    summary = summarized(count(images), resamples=20)
    table = np.array([[expected_figures(*image, label) for label in range(K)] for image in images])  # (N, K, F)
    with np.errstate(invalid="ignore"):
        per_class = np.nansum(table, 0) / np.isfinite(table).sum(0)
    for i, figure in enumerate(FIGURES):
        rows = [summary["per_class"][name][figure] for name in NAMES]
        assert [math.nan if row is None else row for row in rows] == pytest.approx(
            per_class[:, i].tolist(), nan_ok=True
        )
        assert summary[figure] == pytest.approx(np.nanmean(per_class[1:, i]))
    assert summary["per_class"]["vessel"]["dice"] is None and summary["per_class"]["vessel"]["dice_ci95"] is None
    with_background = summarized(count(images), background=None, resamples=20)
    assert with_background["dice"] == pytest.approx(np.nanmean(per_class[:, 0]))
    assert summary["miou"] == with_background["miou"] and summary["hd95_unit"] == "px"


def test_intervals_are_those_of_a_bootstrap_over_images():
    images = pairs(12)
    summary = summarized(count(images), resamples=300, seed=3)
    table = np.array([expected_figures(*image, 2) for image in images])[:, 0]
    rng = np.random.default_rng(3)
    means = [np.nanmean(table[rng.integers(12, size=12)]) for _ in range(300)]
    assert summary["per_class"]["lesion"]["dice_ci95"] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist())
    low, high = summary["dice_ci95"]
    assert low < summary["dice"] < high
    assert summarized(count(images[:1]))["dice_ci95"] is None


def test_counts_of_several_processes_add_up():
    images = pairs(7)
    first, second = count(images[:3]), count(images[3:], first=3)
    second.merge(first)
    assert summarized(second, resamples=20) == summarized(count(images), resamples=20)
