"""Average precision of resampled images equals that of a test set with copies of the images."""

import numpy as np
import pytest

from retinue.evaluation.detection import Accuracy, ImageDetections, average, coco_results, evaluate
from retinue.evaluation.detection_matches import Matches
from retinue.evaluation.lvis import evaluate_federated
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
    nothing = evaluate("box", [], truth, IMAGES, CATEGORIES).matches.intervals(resamples=20)
    assert (nothing == 0).all()


def simulated_matches(num_images: int, rng: np.random.Generator) -> Matches:
    """Return matches of one class with two objects an image, found with a probability that differs by image."""
    image = np.repeat(np.arange(num_images), 4)
    right = rng.random(len(image)) < np.repeat(rng.uniform(0.2, 0.7, num_images), 4)
    # An image has two objects, so the first two right detections are right.
    right &= right.reshape(-1, 4).cumsum(1).ravel() <= 2
    objects = np.repeat(np.arange(num_images), 2)
    return Matches(
        np.array([num_images, 1, 1]),
        image,
        np.zeros(len(image), int),
        rng.normal(right * 1.0, 1),
        np.tile(right, (10, 1)),
        np.zeros((10, len(image)), bool),
        objects,
        np.zeros(len(objects), int),
    )


@pytest.mark.slow
def test_intervals_cover_the_precision_of_the_population():
    rng = np.random.default_rng(0)
    population = simulated_matches(100_000, rng).figures()[0]
    covered = 0
    for _ in range(400):
        low, high = simulated_matches(200, rng).intervals(resamples=200)[0]
        covered += low <= population <= high
    # Precision is biased upwards in small sets and more so in resamples, so the coverage is below 0.95: 362 of 400.
    assert 0.88 < covered / 400 < 0.98
