"""Class weights and balanced draws from the command line."""

import math

import pytest

from tests.retinue.runs.cli import SMALL, SWIN, result, rows
from tests.retinue.runs.test_resume import assert_a_killed_run_ends_the_same


def test_a_run_learns_only_the_classes_that_weigh(cli, tmp_path):
    weights = "{" + ",".join(f"{digit}:0" for digit in range(1, 10)) + "}"
    outcome = cli.train(f"recipe.class_weights={weights}", "recipe.optimizer.lr=0.01", "hydra.run.dir=run")
    assert outcome.code == 0, outcome.err
    per_class = result(tmp_path / "run")["metrics"]["test/per_class"]
    assert per_class["0"]["accuracy"] == 1 and not any(per_class[str(digit)]["accuracy"] for digit in range(1, 10))
    assert all(math.isfinite(float(row["train/loss"])) for row in rows("run/metrics.csv") if row["train/loss"])


def test_an_unknown_class_is_one_line_and_leaves_no_folder(cli):
    outcome = cli.train("recipe.class_weights={zero:2.0}", "hydra.run.dir=run")
    assert "recipe.class_weights: no class is called 'zero'." in outcome.error and not cli.files()
    outcome = cli.train("recipe.class_weights=balancd", "hydra.run.dir=run")
    assert "recipe.class_weights must be balanced, or a mapping of classes to weights, 0 or more" in outcome.error
    assert "recipe.class_weights must be null" in cli.train("task=multi_label", "recipe.class_weights=balanced").error


@pytest.mark.slow
def test_a_killed_run_with_balanced_draws_ends_the_same(tmp_path):
    arguments = (
        *SWIN, *SMALL, "data.sampler=balanced", "recipe.class_weights=balanced", "recipe.augment.mixup=0.8",
        "recipe.epochs=4", "checkpoint.every_steps=1", "hydra.run.dir=run",
    )  # fmt: skip
    assert_a_killed_run_ends_the_same(arguments, tmp_path)
