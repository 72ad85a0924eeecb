"""Panoptic quality equals the algorithm of the reference evaluator, segment by segment."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from retinue.evaluation.panoptic import Segments, class_quality, figures, match, summarize, write_pq_csv, write_segments

K, THINGS = 5, 3
NAMES = ("cat", "dog", "cow", "sky", "sea")


def draw(seed: int) -> tuple[Segments, Segments]:
    """Return predicted and true segments (24, 32) that often overlap by more than half, with void and crowds."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 7, (3, 4)).repeat(8, 0).repeat(8, 1)
    labels = {id: int(rng.integers(0, K - 1)) for id in range(1, 7) if (ids == id).any()}
    crowds: dict[int, int] = {}
    for id, label in labels.items():
        # The reference evaluator knows one crowd of each class.
        if rng.random() < 0.3 and label not in crowds:
            crowds[label] = id
    predicted = np.roll(ids, rng.integers(-3, 4, 2), (0, 1))
    # Two segments of the truth are predicted as one, and some pixels as another segment or as none.
    predicted = np.where(predicted == 6, 5, predicted)
    predicted = np.where(rng.random(ids.shape) < 0.1, rng.integers(0, 6, ids.shape), predicted)
    guess = {id: labels.get(id, 0) if rng.random() < 0.8 else int(rng.integers(0, K)) for id in np.unique(predicted)}
    guess.pop(0, None)
    return Segments(predicted, {int(id): g for id, g in guess.items()}), Segments(
        ids, labels, frozenset(crowds.values())
    )


def judge(prediction: Segments, truth: Segments) -> np.ndarray:
    """Count as panopticapi's evaluation of one image does: pairs of segments, then missed, then wrong ones."""
    counts = np.zeros((4, K))
    area = lambda ids, id: int((ids == id).sum())  # noqa: E731
    both = lambda t, p: int(((truth.ids == t) & (prediction.ids == p)).sum())  # noqa: E731
    found_true, found_predicted = set(), set()
    for t, label in truth.labels.items():
        for p, guess in prediction.labels.items():
            if t in truth.crowds or label != guess:
                continue
            union = area(prediction.ids, p) + area(truth.ids, t) - both(t, p) - both(0, p)
            if both(t, p) / union > 0.5:
                counts[0, label] += both(t, p) / union
                counts[1, label] += 1
                found_true.add(t)
                found_predicted.add(p)
    crowd_of = {truth.labels[t]: t for t in truth.crowds}
    for t, label in truth.labels.items():
        if t not in found_true and t not in truth.crowds:
            counts[3, label] += 1
    for p, guess in prediction.labels.items():
        if p not in found_predicted:
            outside = both(0, p) + (both(crowd_of[guess], p) if guess in crowd_of else 0)
            if outside / area(prediction.ids, p) <= 0.5:
                counts[2, guess] += 1
    return counts


def test_counts_equal_those_of_the_reference_evaluator():
    totals = np.zeros(4)
    for seed in range(60):
        prediction, truth = draw(seed)
        counts = match(prediction, truth, K)
        np.testing.assert_allclose(counts, judge(prediction, truth), rtol=1e-12)
        totals += counts.sum(1)
    assert totals.min() > 20


def test_figures_are_means_over_the_classes_with_segments():
    counts = np.array([[1.5, 0, 0.8, 0, 0], [2, 0, 1, 0, 0], [1, 0, 0, 2, 0], [0, 0, 2, 1, 0]], float)
    pq, sq, rq = class_quality(counts)
    expected = [1.5 / 2.5, math.nan, 0.8 / 2, 0, math.nan]
    np.testing.assert_allclose(pq, expected)
    np.testing.assert_allclose(sq, [0.75, math.nan, 0.8, 0, math.nan])
    np.testing.assert_allclose(pq, sq * rq)
    values = figures(counts, THINGS)
    assert values["pq"] == pytest.approx(1.0 / 3) and values["pq_things"] == pytest.approx(0.5)
    assert values["pq_stuff"] == 0 and values["sq_things"] == pytest.approx(0.775)


def test_the_truth_predicts_itself_and_nothing_misses_all():
    for seed in range(5):
        _, truth = draw(seed)
        perfect = figures(match(truth, truth, K), K)
        assert perfect["pq"] == perfect["sq"] == perfect["rq"] == 1
        nothing = match(Segments(np.zeros_like(truth.ids), {}), truth, K)
        assert nothing[3].sum() == len(truth.labels) - len(truth.crowds) and not nothing[:3].any()


def test_a_summary_is_json_with_intervals(tmp_path):
    counts = {i: match(*draw(i), K) for i in range(12)}
    summary = json.loads(json.dumps(summarize(counts, NAMES, THINGS, resamples=200), allow_nan=False))
    low, high = summary["pq_ci95"]
    assert low < summary["pq"] < high and summary["n"] == 12
    assert summary["per_class"]["sea"]["sq"] in (0.0, None) and list(summary["per_class"]) == list(NAMES)
    assert summary["per_class"]["cat"]["n"] == sum(c[1, 0] + c[3, 0] for c in counts.values())
    assert summarize({0: counts[0]}, NAMES, THINGS)["pq_ci95"] is None
    write_pq_csv(tmp_path / "pq.csv", counts, NAMES)
    assert len((tmp_path / "pq.csv").read_text().splitlines()) == 1 + K


def test_a_written_map_has_the_ids_of_its_segments(tmp_path):
    ids = np.array([[0, 1, 70_000], [9, 1, 300]])
    info = write_segments(tmp_path / "a/b.png", Segments(ids, {1: 2, 70_000: 0, 300: 1}), [10, 20, 30])
    values = np.asarray(Image.open(tmp_path / "a/b.png")).astype(int)
    assert (values @ [1, 256, 65536]).tolist() == [[0, 1, 70_000], [0, 1, 300]]
    assert info == [{"id": 1, "category_id": 30}, {"id": 70_000, "category_id": 10}, {"id": 300, "category_id": 20}]
