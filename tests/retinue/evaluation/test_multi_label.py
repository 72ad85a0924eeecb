"""Figures of multi-label classification are scikit-learn's, also those of a set in which images are repeated."""

import csv

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from retinue.evaluation.multi_label import FIGURES, Ranking, Scores, summarize, write_classes_csv, write_scores_csv

NAMES = ("cat", "dog", "cow", "owl")


def make_scores(n=120, seed=0, levels=12):
    """Return scores for four classes, with many ties; no image has the last class."""
    rng = np.random.default_rng(seed)
    label = rng.random((n, 4)) < (0.5, 0.2, 0.1, 0)
    score = np.clip(rng.normal(0.35 + 0.3 * label, 0.2), 0, 1)
    score = (np.rint(score * levels) / levels).astype(np.float32)
    return Scores(np.arange(n), label, score, rng.random(n))


def sklearn_figures(label, score):
    """Return mean average precision, F1 micro and F1 macro; classes without positives or predictions are undefined."""
    predicted = score >= 0.5
    with_positives, used = label.any(0), label.any(0) | predicted.any(0)
    return [
        average_precision_score(label[:, with_positives], score[:, with_positives], average="macro"),
        f1_score(label, predicted, average="micro"),
        f1_score(label[:, used], predicted[:, used], average="macro"),
    ]


def test_figures_are_those_of_scikit_learn():
    scores = make_scores()
    figures = summarize(scores, NAMES, resamples=20)
    expected = sklearn_figures(scores.label, scores.score)
    np.testing.assert_allclose([figures[name] for name in FIGURES[:3]], expected, rtol=1e-12)
    assert figures["loss"] == pytest.approx(scores.loss.mean())
    for k, name in enumerate(NAMES[:3]):
        ap = average_precision_score(scores.label[:, k], scores.score[:, k])
        assert figures["per_class"][name]["ap"] == pytest.approx(ap, rel=1e-12)
        low, high = figures["per_class"][name]["ap_ci95"]
        assert 0 <= low < high <= 1
    assert figures["per_class"]["owl"] | {"f1": 0, "f1_ci95": 0} == {
        "n": 0, "ap": None, "ap_ci95": None, "f1": 0, "f1_ci95": 0,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_figures_of_draws_are_those_of_the_set_with_repeated_images(seed):
    scores = make_scores(60)
    ranking = Ranking(scores.label, scores.score, scores.loss)
    drawn = np.random.default_rng(seed).integers(60, size=60)
    figures = ranking.figures(np.bincount(drawn, minlength=60).astype(float))
    np.testing.assert_allclose(figures[:3], sklearn_figures(scores.label[drawn], scores.score[drawn]), rtol=1e-12)
    assert figures[3] == pytest.approx(scores.loss[drawn].mean())


def test_intervals_hold_the_figures_of_the_population():
    population = make_scores(20_000, seed=1, levels=10**6)
    truth = sklearn_figures(population.label, population.score)[0]
    rng, held = np.random.default_rng(0), 0
    for trial in range(40):
        chosen = rng.integers(20_000, size=100)
        ranking = Ranking(population.label[chosen], population.score[chosen], population.loss[chosen])
        low, high = ranking.intervals(100, trial)[0]
        held += low <= truth <= high
    assert held >= 35


def test_parts_of_ranks_are_joined_without_padding_and_scores_that_are_not_finite_are_refused():
    scores = make_scores(5)
    columns = (scores.index, scores.label, scores.score, scores.loss)
    parts = [Scores(*(column[rows] for column in columns)) for rows in ([0, 2, 4], [1, 3, 1])]
    padded = Scores(np.array([-1]), scores.label[:1], scores.score[:1], scores.loss[:1])
    joined = Scores.concatenate([*parts, padded])
    np.testing.assert_array_equal(joined.index, np.arange(5))
    np.testing.assert_array_equal(joined.score, scores.score)
    scores.score[3, 1] = np.nan
    with pytest.raises(ValueError, match="the scores of 1 of 5 images are not finite; the first is image 3"):
        summarize(scores, NAMES)


def test_tables_have_a_row_for_each_image_and_class(tmp_path):
    scores = make_scores(6)
    names = [f"{i}.png" for i in range(6)]
    write_scores_csv(tmp_path / "scores.csv", scores, NAMES, names, with_truth=True)
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [row["image"] for row in rows] == names
    for row, label, score in zip(rows, scores.label, scores.score, strict=True):
        assert row["labels"] == " | ".join(name for name, is_there in zip(NAMES, label, strict=True) if is_there)
        assert row["prediction"] == " | ".join(name for name, p in zip(NAMES, score, strict=True) if p >= 0.5)
        np.testing.assert_allclose([float(row[name]) for name in NAMES], score, atol=1e-6)
    write_classes_csv(tmp_path / "classes.csv", summarize(scores, NAMES, resamples=9)["per_class"])
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert [row["class"] for row in rows] == list(NAMES)
    assert [int(row["n"]) for row in rows] == scores.label.sum(0).tolist()
    assert rows[3]["ap"] == "" and float(rows[0]["ap_low"]) <= float(rows[0]["ap_high"])
