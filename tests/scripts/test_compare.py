"""Comparison of nets from the command line, on runs with simulated tests."""

import csv

import numpy as np
import pytest

from retinue.evaluation.contributions import FILE, Contributions
from retinue.evaluation.statistics import holm, mcnemar
from scripts import compare
from tests.retinue.evaluation.conftest import predict
from tests.retinue.evaluation.test_detection_matches import simulated_matches
from tests.scripts.run_folders import make_run

IMAGES = np.array([f"größe/{i}" for i in range(200)])


def make_test(outputs, model, seed, accuracy, images=IMAGES):
    """Make a run of a classifier that is right about this share of the images; return whether it is, (N,)."""
    rng = np.random.default_rng([len(model), seed])
    right = rng.random(len(images)) < accuracy
    folder = make_run(outputs, model, seed, float(right.mean()))
    arrays = {
        "label": np.arange(len(images)) % 5,
        "top1": right,
        "top5": right | True,
        "loss": 1.0 - right,
        "brier": 2.0 * ~right,
    }
    Contributions("classification", images, arrays).write(folder)
    return right


def table(folder, *arguments):
    """Run the script and return the rows of its CSV file."""
    compare.main([str(folder), *arguments, f"out={folder / 'table.csv'}"])
    with open(folder / "table.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_single_runs_are_compared_by_mcnemar_and_holm(tmp_path, capsys):
    right = {name: make_test(tmp_path, name, 0, accuracy) for name, accuracy in (("a", 0.6), ("bb", 0.9), ("ccc", 0.6))}
    baseline, *others = table(tmp_path)
    expected = holm([mcnemar(right[name], right["a"]) for name in ("bb", "ccc")])
    assert [float(row["p"]) for row in others] == pytest.approx(expected)
    assert float(others[0]["diff"]) == pytest.approx(right["bb"].mean() - right["a"].mean())
    assert float(others[0]["diff_low"]) > 0 and baseline["diff"] == ""
    assert float(baseline["top1_low"]) < right["a"].mean() < float(baseline["top1_high"])
    assert " baseline |" in capsys.readouterr().out
    assert table(tmp_path, "baseline=bb")[0]["what"] == "bb"
    # Top-5 accuracies are all 1.
    assert [float(row["p"]) for row in table(tmp_path, "figure=top5")[1:]] == [1, 1]


def test_runs_are_paired_by_seed(tmp_path):
    for seed in range(3):
        make_test(tmp_path, "a", seed, 0.5)
        make_test(tmp_path, "bb", seed, 0.9)
    make_test(tmp_path, "bb", 9, 0.1)
    a, b = table(tmp_path)
    assert (a["seeds"], b["seeds"]) == ("3", "4")
    # The run with seed 9 has no partner.
    assert 0.3 < float(b["diff"]) < 0.5 and float(b["p"]) < 0.05


def test_figures_of_contributions_are_those_of_the_tests(tmp_path):
    predictions = predict(300, 7)
    right = predictions.correct
    arrays = {
        "label": predictions.label,
        "top1": right,
        "top5": right,
        "loss": predictions.loss,
        "brier": predictions.brier,
    }
    Contributions("classification", np.arange(300).astype(str), arrays).write(tmp_path)
    observed = Contributions.read(tmp_path).observed()
    per_class = [right[predictions.label == label].mean() for label in range(7)]
    assert observed["mean_class_accuracy"] == pytest.approx(np.mean(per_class))
    assert observed["loss"] == pytest.approx(predictions.loss.mean())


def test_mistakes_are_answered_in_one_line(tmp_path):
    make_test(tmp_path, "a", 0, 0.6)
    with pytest.raises(ValueError, match="a comparison needs two nets, but all runs are of a"):
        compare.main([str(tmp_path)])
    make_test(tmp_path, "bb", 0, 0.6)
    with pytest.raises(ValueError, match=r"there is no figure .top2. to compare\. Did you mean .top5."):
        compare.main([str(tmp_path), "figure=top2"])
    with pytest.raises(ValueError, match="there is no net 'b'"):
        compare.main([str(tmp_path), "baseline=b"])
    make_test(tmp_path / "other", "ccc", 0, 0.6, IMAGES[:100])
    with pytest.raises(ValueError, match="a and ccc were not tested on the same images"):
        compare.main([str(tmp_path)])
    [file] = (tmp_path / "other").rglob(FILE)
    file.write_bytes(b"PK")
    with pytest.raises(ValueError, match="cannot be read"):
        compare.main([str(tmp_path)])
    file.unlink()
    with pytest.raises(ValueError, match=r"test_images.npz is missing: .* eval.py run="):
        compare.main([str(tmp_path)])


def test_detectors_are_compared_by_half_samples_less_the_bias(tmp_path):
    images = IMAGES[:40]
    observed = []
    for net, name in zip(simulated_matches(40, np.random.default_rng(0), 5, nets=2), ("a", "bb"), strict=True):
        arrays = net.arrays()
        arrays |= {key: np.repeat(arrays[key], 10, 0) for key in ("right", "ignored")}
        arrays = {f"box_{key}": values for key, values in arrays.items()}
        test = Contributions("detection", images, arrays)
        test.write(make_run(tmp_path, name, 0, 0.5))
        observed.append(test.observed()["box_ap"])
    a, b = table(tmp_path, "resamples=100")
    assert [float(row["box_ap"]) for row in (a, b)] == pytest.approx(observed)
    assert float(b["diff"]) == pytest.approx(observed[1] - observed[0])
    assert float(b["diff_low"]) < 0 < float(b["diff_high"]) and float(b["p"]) > 0.05
    for row in (a, b):
        # The figure is biased upwards, so the interval's middle lies below it.
        low, high = float(row["box_ap_low"]), float(row["box_ap_high"])
        assert low < float(row["box_ap"]) and (low + high) / 2 < float(row["box_ap"]) - (high - low) / 20
