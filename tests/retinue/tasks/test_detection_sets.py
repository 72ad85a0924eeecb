"""Figures of a test that joins several sets."""

import numpy as np
import pytest

from retinue.evaluation.contributions import Contributions
from retinue.evaluation.detection import coco_results, evaluate
from tests.retinue.evaluation.test_detection import CATEGORIES, IMAGES, make_truth
from tests.retinue.tasks.test_detection import Data, run_test

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_figures_of_several_sets_are_the_means_over_the_sets(tmp_path):
    data = Data(make_truth())
    data.positions = {"easy": range(2), "hidden": range(2, 6)}
    task = run_test(data)
    figures = task.test_figures(data)
    means = {}
    for name, positions in data.positions.items():
        part = [image for image in task.detections if image.index in positions]
        results = coco_results(part, IMAGES, CATEGORIES)
        accuracy = evaluate("box", results, data.split.truth, [IMAGES[i] for i in positions], CATEGORIES)
        assert figures[f"{name}/n"] == len(positions)
        assert figures[f"{name}/box_ap"] == accuracy.figures["ap"]
        means[name] = accuracy
    assert 0 < figures["easy/box_ap"] != figures["hidden/box_ap"] < 1 and "easy/box_ar100" not in figures
    for name in ("ap", "ap75", "ar100"):
        assert figures[f"box_{name}"] == pytest.approx(np.mean([a.figures[name] for a in means.values()]))
    class_ap = np.nanmean([a.class_ap for a in means.values()], 0)
    assert [row["box_ap"] for row in figures["per_class"].values()] == pytest.approx(class_ap)
    assert figures["n"] == 6 and sum(row["n"] for row in figures["per_class"].values()) == 24
    task.contributions(data).write(tmp_path)
    observed = Contributions.read(tmp_path).observed()
    assert observed == pytest.approx({name: figures[name] for name in observed})
    assert len(observed) == 6 and figures["box_ap_ci95"][0] < figures["box_ap"] < figures["box_ap_ci95"][1]
