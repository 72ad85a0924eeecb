"""Figures of segmentation agree with torchmetrics and mmsegmentation; intervals, table and plots."""

import csv
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassConfusionMatrix

from models.openmmlab.config import library
from retinue.evaluation.plots import draw_confusion
from retinue.evaluation.segmentation import (
    PixelCounts,
    areas,
    class_iou,
    confusion_matrix,
    figures,
    summarize,
    write_iou_csv,
)
from retinue.evaluation.segmentation_plots import class_colours, draw_prediction, overlay, plot_class_iou

K = 6
NAMES = ("wall", "sky", "tree", "road", "lamp", "boat")


def predict(images: int, seed: int = 0, right: float = 0.7) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return predictions and masks (12, 15) of several images.

    The true classes are 0 to 3; a few pixels are predicted as class 4, and class 5 does not occur. Each image has its
    own share of correct pixels, and ignored pixels.
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(images):
        mask = rng.integers(0, 4, (12, 15))
        guess = rng.choice(5, (12, 15), p=[0.24, 0.24, 0.24, 0.24, 0.04])
        prediction = np.where(rng.random((12, 15)) < right * rng.uniform(0.5, 1.4), mask, guess)
        mask[rng.random((12, 15)) < 0.1] = 255
        pairs.append((torch.from_numpy(prediction), torch.from_numpy(mask)))
    return pairs


def count(pairs: list[tuple[torch.Tensor, torch.Tensor]], first: int = 0) -> PixelCounts:
    counts = PixelCounts(K)
    for index, (prediction, mask) in enumerate(pairs, first):
        counts.add(index, confusion_matrix(prediction, mask, K).numpy())
    return counts


def test_the_confusion_matrix_equals_that_of_torchmetrics():
    metric = MulticlassConfusionMatrix(K, ignore_index=255)
    pairs = predict(5)
    for prediction, mask in pairs:
        metric.update(prediction, mask)
    assert np.array_equal(count(pairs).confusion, metric.compute().numpy())


def test_the_figures_equal_those_of_mmsegmentation():
    library("mmseg")
    from mmseg.evaluation.metrics import IoUMetric

    pairs = predict(8)
    iou_metric = IoUMetric(iou_metrics=["mIoU"])
    iou_metric.dataset_meta = {"classes": NAMES}
    samples = [{"pred_sem_seg": {"data": p}, "gt_sem_seg": {"data": m}} for p, m in pairs]
    iou_metric.process({}, samples)
    totals: Any = [sum(part) for part in zip(*iou_metric.results, strict=True)]
    exact = iou_metric.total_area_to_metrics(totals[0], totals[1], totals[2], totals[3])
    # These figures are in per cent with two digits.
    rounded = iou_metric.compute_metrics(iou_metric.results)

    counts = count(pairs)
    ours = figures(areas(counts.confusion))
    np.testing.assert_allclose(class_iou(areas(counts.confusion)), exact["IoU"], rtol=1e-6)
    assert np.isnan(exact["IoU"]).tolist() == [False] * 5 + [True]
    for figure, name in (("miou", "IoU"), ("mean_accuracy", "Acc"), ("pixel_accuracy", "aAcc")):
        assert ours[figure] == pytest.approx(float(np.nanmean(exact[name])), rel=1e-6)
        assert 100 * ours[figure] == pytest.approx(rounded[name if name == "aAcc" else f"m{name}"], abs=0.00501)


def test_figures_of_a_small_example():
    prediction = torch.tensor([[0, 0, 1], [1, 1, 2]])
    mask = torch.tensor([[0, 1, 1], [1, 255, 0]])
    # Correct pixels: 1 of class 0, 2 of class 1. Unions: 3 of class 0, 3 of class 1, 1 of class 2 (predicted only).
    total = areas(confusion_matrix(prediction, mask, 4).numpy())
    assert class_iou(total)[:3].tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    assert np.isnan(class_iou(total)[3])
    assert figures(total) == pytest.approx(
        {"miou": 1 / 3, "pixel_accuracy": 3 / 5, "mean_accuracy": (1 / 2 + 2 / 3) / 2}
    )


def test_a_summary_is_valid_json_with_null_for_absent_classes():
    summary = json.loads(json.dumps(summarize(count(predict(20)), NAMES), allow_nan=False))
    assert summary["n"] == 20
    assert list(summary["per_class"]) == list(NAMES)
    assert summary["per_class"]["boat"] == {"iou": None, "accuracy": None, "pixels": 0}
    assert summary["per_class"]["lamp"] == {"iou": 0.0, "accuracy": None, "pixels": 0}
    ious = [row["iou"] for row in summary["per_class"].values() if row["iou"] is not None]
    assert summary["miou"] == pytest.approx(np.mean(ious))
    for name in ("miou", "pixel_accuracy", "mean_accuracy"):
        low, high = summary[f"{name}_ci95"]
        assert low < summary[name] < high < low + 0.2, name
    assert summarize(count(predict(1)), NAMES)["miou_ci95"] is None


def test_intervals_cover_the_true_value_often_enough():
    truth = figures(areas(count(predict(2000, seed=1)).confusion))["miou"]
    summaries = [summarize(count(predict(30, seed)), NAMES, resamples=200) for seed in range(2, 82)]
    intervals = np.array([summary["miou_ci95"] for summary in summaries])
    coverage = ((intervals[:, 0] <= truth) & (truth <= intervals[:, 1])).mean()
    # With few images, the coverage of a bootstrap interval is a little below 0.95.
    assert coverage > 0.85
    spread = np.std([summary["miou"] for summary in summaries])
    assert np.diff(intervals).mean() == pytest.approx(2 * 1.96 * spread, rel=0.25)


def test_counts_of_several_processes_add_up():
    pairs = predict(7)
    first, second = count(pairs[:3]), count(pairs[3:], first=3)
    second.merge(first)
    assert summarize(second, NAMES) == summarize(count(pairs), NAMES)


def test_masks_with_ignored_pixels_only_are_an_error():
    with pytest.raises(ValueError, match="nothing to evaluate: all pixels of the masks are 255"):
        figures(areas(confusion_matrix(torch.zeros(3, 3, dtype=torch.long), torch.full((3, 3), 255), K).numpy()))


def test_the_table_has_a_row_for_each_class(tmp_path):
    counts = count(predict(4))
    write_iou_csv(tmp_path / "iou.csv", counts, NAMES)
    with open(tmp_path / "iou.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(NAMES)
    assert [float(row["iou"]) for row in rows[:5]] == pytest.approx(class_iou(areas(counts.confusion))[:5], rel=1e-5)
    assert (rows[5]["iou"], rows[4]["accuracy"], rows[4]["true_pixels"]) == ("", "", "0")
    assert sum(int(row["true_pixels"]) for row in rows) == counts.confusion.sum()


def pixels(draw: Callable[..., None], path, *arguments) -> np.ndarray:
    """Draw a plot and read it, (H, W, 3); it must have a minimum size and number of colours."""
    draw(path, *arguments)
    image = np.asarray(Image.open(path).convert("RGB"))
    assert min(image.shape[:2]) > 150 and len(np.unique(image.reshape(-1, 3), axis=0)) > 10
    return image


def test_plots_depend_on_the_counts(tmp_path):
    for draw in (plot_class_iou, lambda path, counts, names: draw_confusion(path, counts.confusion, names, "pixels")):
        first, same, other = (
            pixels(draw, tmp_path / "p.png", count(pairs), NAMES)
            for pairs in (predict(4), predict(4), predict(4, right=0.3))
        )
        assert np.array_equal(first, same)
        assert not np.array_equal(first, other)


def test_an_overlay_leaves_ignored_pixels_unchanged():
    image = np.full((2, 3, 3), 100, np.uint8)
    colours = class_colours(150)
    out = overlay(image, np.array([[0, 149, 255]] * 2, np.uint8), colours)
    assert out[0, 2].tolist() == [100] * 3
    for column, label in ((0, 0), (1, 149)):
        assert out[1, column] == pytest.approx(0.4 * 100 + 0.6 * colours[label], abs=0.51)
    assert len(np.unique(colours, axis=0)) == 150


def test_a_prediction_is_drawn_next_to_the_ground_truth(tmp_path):
    """The colour of the predicted class appears in the right third only, not in the panel of the true labels."""
    image = np.full((40, 60, 1), 128, np.uint8)
    mask, prediction = np.zeros((40, 60), np.uint8), np.zeros((40, 60), np.uint8)
    mask[:20], prediction[:, 30:] = 255, 2
    drawn = pixels(draw_prediction, tmp_path / "deep/er.png", image, mask, prediction, NAMES).astype(int)
    third = drawn.shape[1] // 3
    colour = np.rint(0.4 * 128 + 0.6 * class_colours(K)[2])
    is_predicted = (np.abs(drawn - colour).max(-1) <= 1)[: drawn.shape[0] * 4 // 5]
    assert is_predicted[:, 2 * third :].sum() > 0.3 * is_predicted[:, 2 * third :].size
    assert not is_predicted[:, : 2 * third].any()
