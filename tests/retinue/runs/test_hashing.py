"""Hashing from the command line: training with and without a teacher, evaluation and prediction."""

import numpy as np
import pytest
from PIL import Image

from tests.retinue.runs.cli import SMALL, SWIN, result, rows
from tests.retinue.runs.test_config import composed
from tests.retinue.runs.test_resume import assert_a_killed_run_ends_the_same

TEACHER = ("task.teacher.name=deit_tiny", "+task.teacher.patch=4", "+task.teacher.depths=[1]", "task.bits=8")


def test_a_run_is_evaluated_and_writes_codes(cli, tmp_path):
    outcome = cli.train(
        "task=hashing", *TEACHER, "recipe.epochs=1", "trainer.limit_train_batches=2", "hydra.run.dir=run"
    )
    assert outcome.code == 0, outcome.err
    metrics = result(tmp_path / "run")["metrics"]
    low, high = metrics["test/code_map_ci95"]
    assert 0 < low <= metrics["test/code_map"] <= high < 1 and metrics["test/n"] == 357
    assert any(row["train/transfer"] for row in rows("run/metrics.csv"))
    outcome = cli("eval", "run=run", "trainer=cpu")
    assert outcome.code == 0, outcome.err
    [evaluation] = (tmp_path / "run/evaluation").iterdir()
    assert result(evaluation)["metrics"]["test/code_map"] == pytest.approx(metrics["test/code_map"], abs=1e-3)
    codes = rows(evaluation / "codes.csv")
    assert len(codes) == 357 and all(len(row["code"]) == 8 and set(row["code"]) <= {"0", "1"} for row in codes)

    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(tmp_path / "a.png")
    outcome = cli("predict", "run=run", "images=a.png", "save=out", "trainer=cpu")
    assert outcome.code == 0, outcome.err
    [row] = rows("out/codes.csv")
    assert row["image"] == "a.png" and len(row["code"]) == 8


def test_data_and_recipes_are_those_of_classification(cli):
    cfg = composed("task=hashing", "data=cifar10", "recipe=eet")
    assert (cfg.task.name, cfg.data.name, cfg.recipe.optimizer.name) == ("hashing", "cifar10", "sgd")
    assert composed("task=hashing").data.name == "digits"
    outcome = cli.train("task=hashing", "data=default_detection")
    assert "data=scenes is for task=detection, not task=hashing" in outcome.error


@pytest.mark.slow
def test_a_killed_run_ends_the_same(tmp_path):
    arguments = (*SWIN, *SMALL, "task=hashing", *TEACHER, "checkpoint.every_steps=1", "hydra.run.dir=run")
    assert_a_killed_run_ends_the_same(arguments, tmp_path)
