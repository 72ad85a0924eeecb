"""The table of predictions can be read back, and a failure leaves the previous file unchanged."""

import csv

import numpy as np
import pytest

from retinue.evaluation.classification import Predictions
from retinue.evaluation.predictions import write_predictions_csv

CLASSES = ['say "cheese", please', "tench, Tinca tinca", "Ærø, ü"]
IMAGES = ["a/0.jpg", "b, c.jpg", 'd "e".jpg', "f.jpg"]


def make_predictions() -> Predictions:
    return Predictions(
        index=np.array([1, 3]),
        label=np.array([0, 2]),
        topk=np.array([[0, 2, 1], [1, 0, 2]]),
        scores=np.array([[0.75, 0.2, 0.05], [0.6, 0.3, 0.1]]),
        loss=np.array([0.28768207, 2.3025851]),
        brier=np.array([0.105, 1.26]),
    )


def test_rows_are_read_back_as_they_were_written(tmp_path):
    path = tmp_path / "made" / "predictions.csv"
    write_predictions_csv(path, make_predictions(), CLASSES, IMAGES)
    with open(path, newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert list(first) == ["image", "label", "prediction", "correct", "confidence", "loss", "top5"]
    assert (first["image"], first["label"], first["prediction"]) == (IMAGES[1], CLASSES[0], CLASSES[0])
    assert (second["image"], second["label"], second["prediction"]) == (IMAGES[3], CLASSES[2], CLASSES[1])
    assert (first["correct"], second["correct"]) == ("1", "0")
    assert (float(first["confidence"]), float(second["loss"])) == (0.75, pytest.approx(2.3025851, abs=1e-5))
    assert first["top5"].split(" | ") == [CLASSES[0], CLASSES[2], CLASSES[1]]


def test_a_failure_leaves_the_previous_file(tmp_path):
    path = tmp_path / "predictions.csv"
    path.write_text("before")
    with pytest.raises(IndexError):
        write_predictions_csv(path, make_predictions(), CLASSES, IMAGES[:2])
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
