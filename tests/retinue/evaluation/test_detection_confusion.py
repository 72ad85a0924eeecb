"""The confusion matrix of detections, compared with its definition as loops."""

import itertools

import numpy as np

from retinue.evaluation.detection import ImageDetections
from retinue.evaluation.detection_confusion import confusion_matrix

CATEGORIES = [7, 2, 40]


def image(index, boxes, scores, labels) -> ImageDetections:
    arrays = np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(labels, np.int64)
    return ImageDetections(index, (100, 100), *arrays, None)


def annotation(image_id, label, box, crowd=0):
    x1, y1, x2, y2 = box
    return {
        "image_id": image_id, "category_id": CATEGORIES[label], "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": crowd,
    }  # fmt: skip


def test_an_example_by_hand():
    truth = {
        "annotations": [
            annotation(5, 0, (0, 0, 10, 10)),
            annotation(5, 1, (50, 50, 60, 60)),
            annotation(5, 2, (20, 0, 30, 10)),
            annotation(5, 0, (70, 0, 100, 40), crowd=1),
        ]
    }
    found = image(
        0,
        [(0, 0, 10, 9), (0, 0, 10, 8), (50, 50, 60, 60), (80, 5, 90, 15), (20, 0, 30, 10), (40, 80, 50, 90)],
        [0.5, 0.9, 0.8, 0.9, 0.29, 0.7],
        [0, 0, 2, 1, 2, 1],
    )
    matrix = confusion_matrix([found], truth, [5], CATEGORIES)
    expected = np.zeros((4, 4), int)
    # The better of two boxes on an object is its own, and the other one is on the background.
    expected[0, 0] = expected[3, 0] = 1
    # An object of class 1 was found as class 2; one of class 2 had a score that is too low.
    expected[1, 2] = expected[2, 3] = 1
    # A detection in a crowd does not count, the one on the background does.
    expected[3, 1] = 1
    np.testing.assert_array_equal(matrix, expected)


def iou(a, b) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def test_loops_give_the_same_matrix():
    rng = np.random.default_rng(0)
    expected, annotations, images = np.zeros((4, 4), int), [], []
    for index in range(20):
        corners = rng.integers(0, 40, (2, 6, 2)).astype(float)
        true, boxes = (np.concatenate([part, part + rng.integers(15, 40, (6, 2))], 1) for part in corners)
        # Some detections lie near objects.
        boxes[:3] = true[:3] + rng.integers(-4, 4, (3, 4))
        true_labels, labels = rng.integers(0, 3, (2, 6))
        scores = rng.random(6)
        annotations += [annotation(index + 1, label, box) for label, box in zip(true_labels, true, strict=True)]
        images.append(image(index, boxes, scores, labels))
        free_true, free = set(range(6)), {i for i in range(6) if np.float32(scores[i]) >= 0.3}
        while pairs := [(iou(boxes[i], true[j]), i, j) for i, j in itertools.product(free, free_true)]:
            best, i, j = max(pairs)
            if best < 0.5:
                break
            expected[true_labels[j], labels[i]] += 1
            free.remove(i)
            free_true.remove(j)
        for j in free_true:
            expected[true_labels[j], 3] += 1
        for i in free:
            expected[3, labels[i]] += 1
    matrix = confusion_matrix(images, {"annotations": annotations}, list(range(1, 21)), CATEGORIES)
    np.testing.assert_array_equal(matrix, expected)
    assert matrix[:3].sum() == 120 and np.trace(matrix) > 0


def test_nothing_found_and_nothing_there():
    empty = image(0, [], [], [])
    assert confusion_matrix([empty], {"annotations": []}, [1], CATEGORIES).sum() == 0
    matrix = confusion_matrix([empty], {"annotations": [annotation(1, 1, (0, 0, 9, 9))]}, [1], CATEGORIES)
    assert matrix[1, 3] == matrix.sum() == 1
