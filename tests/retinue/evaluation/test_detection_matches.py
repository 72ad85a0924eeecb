"""Average precision of resampled images equals that of a test set with copies of the images."""

import numpy as np
import pytest

from retinue.evaluation.detection import Accuracy, ImageDetections, average, coco_results, evaluate
from retinue.evaluation.detection_matches import Matches
from retinue.evaluation.lvis import evaluate_federated
from retinue.evaluation.statistics import draw_halves, half_sample_intervals
from retinue.results.compare import difference_of
from tests.retinue.evaluation.test_detection import CATEGORIES, IMAGES, make_truth, predictions

# pycocotools warns with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


def noisy_results(truth, images=IMAGES):
    """Return detections with scores that say nothing, labels that are sometimes wrong, and boxes 3 pixels off."""
    rng, detections = np.random.default_rng(1), []
    for position in range(len(IMAGES)):
        found = predictions(truth, position, 3)
        boxes, labels = found["boxes"].numpy(), found["labels"].numpy()
        wrong = rng.random(len(labels)) < 0.3
        labels = np.where(wrong, (labels + 1) % 3, labels)
        order = np.argsort(-(scores := rng.random(len(labels))))
        detections.append(ImageDetections(position, found["size"], boxes[order], scores[order], labels[order], None))
    return coco_results(detections, images, CATEGORIES)


def copies(truth, results, counts):
    """Return a truth and results in which image i occurs `counts[i]` times, under new ids."""
    new_truth, new_results = {**truth, "images": [], "annotations": []}, []
    for image, count in zip(truth["images"], counts, strict=True):
        for _ in range(count):
            new = {"image_id": len(new_truth["images"]) + 1}
            new_truth["images"].append({**image, "id": new["image_id"]})
            new_truth["annotations"] += [{**a, **new} for a in truth["annotations"] if a["image_id"] == image["id"]]
            new_results += [{**r, **new} for r in results if r["image_id"] == image["id"]]
    return new_truth, new_results


@pytest.mark.parametrize("rules", [evaluate, evaluate_federated])
def test_resampled_precision_is_that_of_copied_images(rules):
    truth = make_truth()
    for image in truth["images"]:
        image |= {"neg_category_ids": CATEGORIES[:1], "not_exhaustive_category_ids": CATEGORIES[1:2]}
    results = noisy_results(truth)
    matches = rules("box", results, truth, IMAGES, CATEGORIES).matches
    for counts in ([1] * 6, [2, 0, 3, 1, 0, 2], [0, 0, 1, 0, 0, 4], [0, 2, 0, 2, 2, 0]):
        new_truth, new_results = copies(truth, results, counts)
        ids = [image["id"] for image in new_truth["images"]]
        expected = rules("box", new_results, new_truth, ids, CATEGORIES)
        figures = [np.nan if (value := expected.figures[name]) is None else value for name in ("ap", "ap50", "ap75")]
        np.testing.assert_allclose(
            matches.figures(np.array(counts, float)), [*figures, *expected.class_ap], rtol=0, atol=1e-12
        )


def test_joined_sets_are_averaged_as_without_resampling():
    truth, sets = make_truth(), [[0, 2, 5], [1, 3, 4]]
    results = noisy_results(truth)
    parts: list[Accuracy] = []
    for rows in sets:
        ids = [IMAGES[row] for row in rows]
        own = [result for result in results if result["image_id"] in ids]
        parts.append(evaluate("box", own, truth, ids, CATEGORIES))
    joined = average(parts, [np.array(rows) for rows in sets], len(IMAGES))
    assert joined.matches.figures()[0] == pytest.approx(joined.figures["ap"])
    np.testing.assert_allclose(joined.matches.figures()[3:], joined.class_ap)
    # The second set alone counts.
    assert joined.matches.figures(np.array([0.0, 1, 0, 1, 1, 0]))[0] == pytest.approx(parts[1].figures["ap"])


def test_a_single_image_and_a_set_without_detections_have_no_interval_to_speak_of():
    truth = make_truth()
    own = [result for result in noisy_results(truth) if result["image_id"] == IMAGES[0]]
    assert np.isnan(evaluate("box", own, truth, IMAGES[:1], CATEGORIES).matches.intervals()).all()
    nothing = evaluate("box", [], truth, IMAGES, CATEGORIES).matches.intervals(count=20)
    assert (nothing == 0).all()


def simulated_matches(num_images: int, rng: np.random.Generator, num_classes: int = 1, nets: int = 1) -> list[Matches]:
    """Return the matches of equally good nets on the same images, which have two objects each.

    An object has two detections. Images are of different difficulty, and one of two wrong detections has a wrong class.
    Matches are the same at all thresholds, so that one of them is enough.
    """
    image = np.repeat(np.arange(num_images), 4)
    objects, label = image[::2], rng.integers(num_classes, size=2 * num_images)
    easy = rng.uniform(0.2, 0.7, num_images)[image]
    matches = []
    for _ in range(nets):
        right = rng.random(len(image)) < easy
        # The second detection of an object that has been found is wrong.
        right[1::2] &= ~right[::2]
        confused = ~right & (rng.random(len(image)) < 0.5)
        predicted = np.where(confused, rng.integers(num_classes, size=len(image)), label.repeat(2))
        shape, none = np.array([num_images, num_classes, 1]), np.zeros((1, len(image)), bool)
        score = rng.normal(right * 1.0, 1)
        matches.append(Matches(shape, image, predicted, score, right[None], none, objects, label))
    return matches


def mean_ap(matches: Matches, draws: np.ndarray | None = None) -> float:
    return float(np.nanmean(matches.class_precision(draws)))


@pytest.mark.slow
@pytest.mark.parametrize(("num_images", "num_classes", "lowest"), [(200, 1, 0.93), (50, 1, 0.92), (200, 10, 0.90)])
def test_intervals_cover_the_precision_of_the_population(num_images, num_classes, lowest):
    rng = np.random.default_rng(0)
    population = np.mean([mean_ap(simulated_matches(100_000, rng, num_classes)[0]) for _ in range(3)])
    halves = list(draw_halves(num_images, 200, 0))
    covered = too_high = 0
    for _ in range(400):
        [matches] = simulated_matches(num_images, rng, num_classes)
        values = np.array([[mean_ap(matches, half)] for half in halves])
        [[low, high]] = half_sample_intervals(np.array([mean_ap(matches)]), values, num_images)
        covered += low <= population <= high
        too_high += population < low
    assert lowest < covered / 400 < 0.98
    assert too_high < 0.08 * 400


@pytest.mark.slow
def test_differences_of_average_precision_keep_their_level():
    """Compare two equally good nets on 200 images with 10 classes, by what compare.py computes."""
    rng, halves = np.random.default_rng(1), list(draw_halves(200, 200, 0))
    found = covered = 0
    for _ in range(400):
        pair = simulated_matches(200, rng, 10, nets=2)
        observed = [mean_ap(pair[0]) - mean_ap(pair[1])]
        values = np.array([[mean_ap(pair[0], half) - mean_ap(pair[1], half)] for half in halves])
        difference = difference_of("box_ap", observed, values)
        found += difference.p < 0.05
        covered += difference.low <= 0 <= difference.high
    assert found / 400 < 0.08 and 0.92 < covered / 400 < 0.985
