"""Figures of classification agree with scikit-learn, SciPy and theory; intervals and errors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from retinue.evaluation.classification import Predictions, summarize, topk_predictions, wilson
from tests.retinue.evaluation.conftest import predict

CLASS_NAMES = [f"class {i}" for i in range(10)]


def guesses(label: list[int], top1: list[int], confidence: list[float]) -> Predictions:
    """Return predictions with the most probable class only."""
    columns = np.array(label), np.array(top1)[:, None], np.array(confidence)[:, None]
    return Predictions(np.arange(len(label)), *columns, np.full(len(label), 0.5), np.full(len(label), 0.25))


def test_a_batch_gives_the_most_probable_classes_and_the_cross_entropy_of_each_image():
    logits, label = torch.randn(6, 8, generator=torch.manual_seed(0)), torch.tensor([0, 1, 2, 3, 4, 7])
    batch_predictions = topk_predictions(logits.bfloat16(), label, torch.arange(6))
    expected = logits.bfloat16().float()
    np.testing.assert_array_equal(batch_predictions.topk, expected.topk(5).indices)
    np.testing.assert_allclose(batch_predictions.scores, expected.softmax(1).topk(5).values, rtol=1e-5)
    np.testing.assert_allclose(batch_predictions.loss, F.cross_entropy(expected, label, reduction="none"), rtol=1e-5)


def test_a_subset_is_selected_before_the_softmax_and_keeps_the_class_numbers():
    logits, label = torch.randn(5, 8, generator=torch.manual_seed(0)), torch.tensor([6, 1, 2, 6, 4])
    batch_predictions = topk_predictions(logits, label, torch.arange(5) + 10, subset=[6, 4, 0])
    # Images of the subset's classes.
    rows = torch.tensor([0, 3, 4])
    subset_logits = logits[rows][:, [6, 4, 0]]
    np.testing.assert_array_equal(batch_predictions.index, [10, 13, 14])
    np.testing.assert_array_equal(batch_predictions.label, [6, 6, 4])
    np.testing.assert_array_equal(
        batch_predictions.topk, torch.tensor([6, 4, 0])[subset_logits.argsort(1, descending=True)]
    )
    np.testing.assert_allclose(batch_predictions.scores.sum(1), 1, rtol=1e-6)
    error = subset_logits.softmax(1) - torch.eye(3)[[0, 0, 1]]
    np.testing.assert_allclose(batch_predictions.brier, (error**2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(
        batch_predictions.loss, F.cross_entropy(subset_logits, torch.tensor([0, 0, 1]), reduction="none"), rtol=1e-5
    )


@pytest.mark.parametrize("subset", [[], [1, 1], [8], [-1]])
def test_an_invalid_subset_is_refused(subset):
    with pytest.raises(ValueError, match=r"different classes of 0\.\.7"):
        topk_predictions(torch.zeros(1, 8), torch.tensor([1]), torch.tensor([0]), subset=subset)


def test_parts_are_joined_by_index_without_padding_and_repeats(predictions):
    def part(rows: list[int], index: list[int]) -> Predictions:
        p = predictions
        return Predictions(np.array(index), p.label[rows], p.topk[rows], p.scores[rows], p.loss[rows], p.brier[rows])

    joined = Predictions.concatenate([part([3, 1, 0], [3, 1, -1]), part([2, 0, 3, 5], [2, 0, 3, -1])])
    assert len(joined) == 4
    for column in ("index", "label", "topk", "scores", "loss", "brier"):
        np.testing.assert_array_equal(getattr(joined, column), getattr(predictions, column)[:4])


def test_rates_agree_with_scikit_learn(predictions):
    figures = summarize(predictions, CLASS_NAMES)
    scores = np.zeros((500, 10))
    np.put_along_axis(scores, predictions.topk, predictions.scores, 1)
    matrix = confusion_matrix(predictions.label, predictions.topk[:, 0])
    assert figures["n"] == 500
    assert figures["top1"] == pytest.approx(np.trace(matrix) / 500)
    assert figures["top5"] == pytest.approx(top_k_accuracy_score(predictions.label, scores, k=5))
    assert figures["mean_class_accuracy"] == pytest.approx(
        balanced_accuracy_score(predictions.label, predictions.topk[:, 0])
    )
    assert [figures["per_class"][name]["accuracy"] for name in CLASS_NAMES] == pytest.approx(
        matrix.diagonal() / matrix.sum(1)
    )
    assert [figures["per_class"][name]["n"] for name in CLASS_NAMES] == matrix.sum(1).tolist()
    assert figures["loss"] == pytest.approx(predictions.loss.mean())


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (3, 10), (360, 360), (40123, 50000)])
def test_wilson_agrees_with_scipy(successes, n):
    expected = binomtest(successes, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson(successes / n, n), [expected.low, expected.high], atol=1e-12)


def test_the_interval_of_the_mean_class_accuracy_equals_that_of_top1_if_classes_are_alike():
    alike = guesses([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 0], [0.9] * 8)
    figures = summarize(alike, ["a", "b"])
    assert figures["mean_class_accuracy_ci95"] == pytest.approx(figures["top1_ci95"])
    rare = guesses([0] * 100 + [1] * 4, [0] * 100 + [1, 1, 0, 0], [0.9] * 104)
    low, high = summarize(rare, ["a", "b"])["mean_class_accuracy_ci95"]
    assert low < 0.75 < high
    # The interval is wide because four images decide half of the mean.
    assert high - low > 0.4


def test_calibration_error_in_closed_form():
    # Bin (0.8, 0.867]: confidence 0.85, two of four right. Bin (0.2, 0.267]: confidence 0.25, one of one right.
    figures = summarize(guesses([0, 0, 0, 0, 1], [0, 0, 1, 1, 1], [0.85] * 4 + [0.25]), ["a", "b"])
    assert figures["ece"] == pytest.approx(4 / 5 * 0.35 + 1 / 5 * 0.75)
    # Both confidences are in the first bin, which includes its upper limit.
    edge = summarize(guesses([0, 0], [0, 1], [0.03, 1 / 15]), ["a", "b"])
    assert edge["ece"] == pytest.approx(1 / 2 - (0.03 + 1 / 15) / 2)


def test_adaptive_error_and_risk_coverage_equal_their_definitions():
    p = predict(500, 10)
    confidence, wrong = p.confidence, ~p.correct
    figures, order = summarize(p, CLASS_NAMES), np.argsort(-confidence)
    risks = [wrong[order[: n + 1]].mean() for n in range(500)]
    assert figures["aurc"] == pytest.approx(np.mean(risks))
    assert figures["aurc_ci95"][0] < figures["aurc"] < figures["aurc_ci95"][1]
    assert figures["brier_ci95"][0] < figures["brier"] < figures["brier_ci95"][1]
    # 15 bins of 33 or 34 images, from the least confident upwards.
    bins = np.array_split(order[::-1], 15)
    gaps = [len(part) / 500 * abs(p.correct[part].mean() - confidence[part].mean()) for part in bins]
    assert figures["adaptive_ece"] == pytest.approx(sum(gaps), abs=1e-3)
    # Equal confidences give the share of wrong answers whatever the order.
    assert summarize(guesses([0, 0, 0, 0], [1, 0, 0, 1], [0.5] * 4), ["a", "b"])["aurc"] == pytest.approx(0.5)


def test_bootstrap_intervals_have_the_width_that_theory_predicts():
    figures = summarize(predict(4000, 10), CLASS_NAMES)
    loss = predict(4000, 10).loss
    half = 1.96 * loss.std() / np.sqrt(len(loss))
    assert figures["loss_ci95"] == pytest.approx([loss.mean() - half, loss.mean() + half], abs=0.15 * half)
    assert figures["loss_ci95"] == summarize(predict(4000, 10), CLASS_NAMES)["loss_ci95"]
    assert figures["loss_ci95"] != summarize(predict(4000, 10), CLASS_NAMES, seed=1)["loss_ci95"]


@pytest.mark.parametrize(("true_error", "share"), [(0.0, 0.85), (0.05, 0.85)])
def test_the_calibration_interval_covers_the_true_error(true_error, share):
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(60):
        confidence = rng.uniform(0.3, 0.95, 400)
        right = rng.random(400) < confidence - true_error
        p = guesses([0] * 400, np.where(right, 0, 1).tolist(), confidence.tolist())
        low, high = summarize(p, ["a", "b"], resamples=200)["ece_ci95"]
        covered.append(low <= true_error <= high)
    assert np.mean(covered) > share


def test_a_class_without_images_is_null_and_the_figures_are_valid_json(predictions):
    figures = summarize(predictions, [*CLASS_NAMES, "unicorn"])
    assert figures["per_class"]["unicorn"] == {"n": 0, "accuracy": None, "ci95": None}
    assert figures["mean_class_accuracy"] == summarize(predictions, CLASS_NAMES)["mean_class_accuracy"]
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_one_image():
    figures = summarize(guesses([1], [1], [0.7]), ["a", "b"])
    assert (figures["top1"], figures["mean_class_accuracy"], figures["ece"]) == (1, 1, pytest.approx(0.3))
    assert figures["top1_ci95"] == pytest.approx([0.2065, 1], abs=1e-4)
    assert figures["mean_class_accuracy_ci95"] == figures["top1_ci95"]
    assert figures["loss_ci95"] is None
    assert figures["ece_ci95"] is None
    json.dumps(figures, allow_nan=False)


def test_classes_with_the_same_name_stay_apart():
    figures = summarize(guesses([0, 1, 2], [0, 1, 1], [0.9] * 3), ["crane", "dog", "crane"])
    assert [(key, value["accuracy"]) for key, value in figures["per_class"].items()] == [
        ("crane (0)", 1.0), ("dog", 1.0), ("crane (2)", 0.0),
    ]  # fmt: skip


def test_invalid_predictions_are_refused(predictions):
    empty = Predictions(*(getattr(predictions, f)[:0] for f in ("index", "label", "topk", "scores", "loss", "brier")))
    with pytest.raises(ValueError, match="no predictions"):
        summarize(empty, CLASS_NAMES)
    with pytest.raises(ValueError, match="label 9 has no name: there are 9 classes"):
        summarize(predictions, CLASS_NAMES[:9])
    loss = predictions.loss.copy()
    loss[[7, 9]] = np.nan
    with pytest.raises(ValueError, match="scores of 2 of 500 images are not finite; the first is image 7"):
        summarize(replace(predictions, loss=loss), CLASS_NAMES)
