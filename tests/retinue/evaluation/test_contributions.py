"""Figures that follow from the file of the test images are those of the test."""

import numpy as np
import pytest

from retinue.evaluation import manipulation, panoptic, segmentation
from retinue.evaluation.contributions import Contributions
from retinue.evaluation.medical import FIGURES
from tests.retinue.evaluation.test_medical import count, pairs, summarized

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


@pytest.mark.parametrize("background", [0, None])
def test_medical_figures_of_resampled_images_are_those_of_copied_images(tmp_path, background):
    images = pairs(3)
    counts = count(images)
    arrays = {
        "areas": np.stack([counts.areas[i] for i in range(3)]),
        "distances": np.stack([counts.distances[i] for i in range(3)]),
        "background": np.array(-1 if background is None else background),
    }
    test = reread(tmp_path, "segmentation", arrays)
    for chosen, draws in (([0, 1, 2], [1.0, 1, 1]), ([0, 1, 1], [1.0, 2, 0])):
        expected = summarized(count([images[i] for i in chosen]), background, resamples=2)
        figures = test.figures(np.array(draws))
        assert {name: figures[name] for name in ("miou", *FIGURES)} == pytest.approx(
            {name: expected[name] for name in ("miou", *FIGURES)}
        )


def test_figures_of_pixels_leave_out_images_that_lack_them(tmp_path):
    areas = np.stack([segmentation.areas(np.array(m)) for m in ([[5, 1], [2, 8]], [[9, 3], [0, 0]], [[4, 0], [3, 3]])])
    aucs = np.array([0.9, np.nan, 0.7])
    test = reread(tmp_path, "segmentation", {"areas": areas, "pixel_auc": aucs})
    expected = manipulation.summarize(areas[[0, 0, 2]], aucs[[0, 0, 2]], resamples=2)
    figures = test.figures(np.array([2.0, 0, 1]))
    assert figures["pixel_auc"] == pytest.approx(2.5 / 3) == pytest.approx(expected["pixel_auc"])
    assert figures["pixel_f1"] == pytest.approx(expected["pixel_f1"])
    assert np.isnan(test.figures(np.array([0.0, 1, 0]))["pixel_auc"])


def test_panoptic(tmp_path):
    counts = np.random.default_rng(0).integers(1, 9, (3, 4, 5)).astype(float)
    test = reread(tmp_path, "panoptic", {"counts": counts, "num_things": np.array(2)})
    drawn = panoptic.figures(counts[[0, 1, 1]].sum(0), 2)
    assert test.figures(np.array([1.0, 2, 0])) == pytest.approx(drawn)


def test_a_file_of_another_task_is_refused(tmp_path):
    Contributions("retrieval", NAMES, {}).write(tmp_path)
    with pytest.raises(ValueError, match=r"test_images.npz cannot be read: 'retrieval'; evaluate the run by eval.py"):
        Contributions.read(tmp_path)
