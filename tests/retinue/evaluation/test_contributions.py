"""Figures that follow from the file of the test images are those of the test."""

import numpy as np
import pytest

from retinue.evaluation import panoptic, segmentation
from retinue.evaluation.contributions import Contributions

NAMES = np.array(["a", "b/ü", "c"])


def reread(folder, task, arrays):
    Contributions(task, NAMES, arrays).write(folder)
    test = Contributions.read(folder)
    assert test.images.tolist() == NAMES.tolist()
    return test


def test_segmentation(tmp_path):
    rng = np.random.default_rng(0)
    areas = np.stack([segmentation.areas(rng.integers(0, 50, (4, 4))) for _ in NAMES])
    test = reread(tmp_path, "segmentation", {"areas": areas})
    assert test.observed() == pytest.approx(segmentation.figures(areas.sum(0)))
    # The second image counts twice, and the third not at all.
    drawn = areas[[0, 1, 1]].sum(0)
    assert test.figures(np.array([1.0, 2, 0])) == pytest.approx(segmentation.figures(drawn))


def test_panoptic(tmp_path):
    counts = np.random.default_rng(0).integers(1, 9, (3, 4, 5)).astype(float)
    test = reread(tmp_path, "panoptic", {"counts": counts, "num_things": np.array(2)})
    drawn = panoptic.figures(counts[[0, 1, 1]].sum(0), 2)
    assert test.figures(np.array([1.0, 2, 0])) == pytest.approx(drawn)


def test_a_file_of_another_task_is_refused(tmp_path):
    Contributions("retrieval", NAMES, {}).write(tmp_path)
    with pytest.raises(ValueError, match=r"test_images.npz cannot be read: 'retrieval'; evaluate the run by eval.py"):
        Contributions.read(tmp_path)
