"""Figures of retrieval and of out-of-distribution scores, compared with scikit-learn and with loops in float64."""

import math

import numpy as np
import pytest
import torch
from sklearn.covariance import EmpiricalCovariance
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from retinue.evaluation.statistics import draw_images
from retinue.probing.features import Features
from retinue.probing.outliers import OutlierScores, outlier_figures
from retinue.probing.retrieval import average_precision, retrieve, summarise_queries


def random_features(images: int, seed: int, channels: int = 6, classes: int = 3, shift: float = 0.0) -> Features:
    rng = np.random.default_rng(seed)
    label = rng.integers(classes, size=images)
    values = rng.normal(size=(images, channels)) + shift
    values[np.arange(images), label] += 1.5
    return Features(torch.tensor(values, dtype=torch.float32), torch.tensor(label), torch.arange(images))


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_scikit_learns(ties):
    rng = np.random.default_rng(0)
    scores = rng.integers(5, size=(20, 40)).astype(np.float32) if ties else rng.normal(size=(20, 40))
    relevant = rng.random((20, 40)) < 0.2
    relevant[:, 0] = True
    ours = average_precision(torch.tensor(scores), torch.tensor(relevant))
    expected = [average_precision_score(*pair) for pair in zip(relevant, scores, strict=True)]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_retrieval_is_the_loop_over_queries(leave_one_out, monkeypatch):
    # Several parts of two queries
    monkeypatch.setattr("retinue.probing.retrieval.ENTRIES", 80)
    gallery = random_features(40, 0)
    query = gallery if leave_one_out else random_features(15, 1)
    values = retrieve(query, gallery, [1, 3], leave_one_out)
    mean = gallery.values.mean(0)
    for i in range(len(query.label)):
        others = [j for j in range(40) if not (leave_one_out and j == i)]
        relevant = np.array([bool(gallery.label[j] == query.label[i]) for j in others])
        cosine = [
            float(torch.cosine_similarity(query.values[i].double(), gallery.values[j].double(), 0)) for j in others
        ]
        hamming = [int(((query.values[i] > mean) != (gallery.values[j] > mean)).sum()) for j in others]
        first = [relevant[place] for place in np.argsort(cosine)[::-1]]
        assert values["map"][i] == pytest.approx(average_precision_score(relevant, cosine), rel=1e-9)
        assert values["hamming_map"][i] == pytest.approx(
            average_precision_score(relevant, [-d for d in hamming]), rel=1e-9
        )
        assert values["recall1"][i] == first[0] and values["recall3"][i] == any(first[:3])


def test_a_query_without_a_relevant_image_does_not_count():
    gallery, query = random_features(30, 0, classes=2), random_features(20, 1, classes=3)
    values = retrieve(query, gallery, [1], leave_one_out=False)
    lonely = query.label.numpy() == 2
    assert lonely.any() and np.isnan(values["map"][lonely]).all() and np.isfinite(values["map"][~lonely]).all()
    figures = summarise_queries(values, resamples=200, seed=3)
    kept = values["map"][~lonely]
    assert figures["n"] == len(kept) and figures["map"] == pytest.approx(kept.mean())
    resampled = [counts @ kept / len(kept) for counts in draw_images(len(kept), 200, 3)]
    assert figures["map_ci95"] == pytest.approx(np.percentile(resampled, [2.5, 97.5]).tolist())


def scores_of(
    images: Features, train: Features, weight: np.ndarray, bias: np.ndarray, k: int
) -> dict[str, list[float]]:
    """Return the scores by their definitions, one image after the other in float64."""
    gallery = train.values.double().numpy()
    origin = -np.linalg.pinv(weight.T) @ bias
    covariance = EmpiricalCovariance(assume_centered=True).fit(gallery - origin).covariance_
    eigenvalues, vectors = np.linalg.eig(covariance)
    outside = vectors[:, np.argsort(-eigenvalues)[gallery.shape[1] // 2 :]]
    norms = [np.linalg.norm((row - origin) @ outside) for row in gallery]
    scale = np.mean([(row @ weight + bias).max() for row in gallery]) / np.mean(norms)
    result: dict[str, list[float]] = {"msp": [], "energy": [], "vim": [], "knn": []}
    for row in images.values.double().numpy():
        exponentials = [math.exp(logit) for logit in row @ weight + bias]
        energy = math.log(sum(exponentials))
        result["msp"].append(max(exponentials) / sum(exponentials))
        result["energy"].append(energy)
        result["vim"].append(float(energy - scale * np.linalg.norm((row - origin) @ outside)))
        similarity = sorted(
            (row @ other / np.linalg.norm(row) / np.linalg.norm(other) for other in gallery), reverse=True
        )
        result["knn"].append(similarity[k - 1])
    return result


def test_scores_follow_their_definitions():
    train, images = random_features(50, 0), random_features(12, 1)
    rng = np.random.default_rng(2)
    weight, bias = rng.normal(size=(6, 3)), rng.normal(size=3)
    ours = OutlierScores(train, torch.tensor(weight), torch.tensor(bias), k=4)([images])[0]
    for name, expected in scores_of(images, train, weight, bias, 4).items():
        np.testing.assert_allclose(ours[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)
    with pytest.raises(ValueError, match=r"probe\.k=51 is more than the 50 training images"):
        OutlierScores(train, torch.tensor(weight), torch.tensor(bias), k=51)


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_and_fpr95_are_scikit_learns(ties):
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 80), rng.normal(0, 1, 50)
    if ties:
        inside, outside = inside.round(), outside.round()
    figures = outlier_figures({"msp": inside}, {"msp": outside}, resamples=100, seed=5)

    def expected(own: np.ndarray, other: np.ndarray) -> tuple[float, float]:
        truth, scores = np.repeat([1, 0], [len(own), len(other)]), np.concatenate([own, other])
        false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
        return float(roc_auc_score(truth, scores)), float(false[np.flatnonzero(true >= 0.95)[0]])

    assert (figures["msp_auroc"], figures["msp_fpr95"]) == pytest.approx(expected(inside, outside))
    draws = zip(draw_images(80, 100, 5), draw_images(50, 100, 6), strict=True)
    resampled = [expected(inside.repeat(a.astype(int)), outside.repeat(b.astype(int))) for a, b in draws]
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0).T.tolist()
    assert figures["msp_auroc_ci95"] == pytest.approx(low) and figures["msp_fpr95_ci95"] == pytest.approx(high)
    assert figures["n"] == 50
