"""Hashing from the command line: training with and without a teacher, evaluation and prediction."""

import numpy as np
import pytest
import torch
from PIL import Image

from retinue.runs.training import build_data, build_task
from tests.retinue.runs.cli import SMALL, SWIN, result, rows
from tests.retinue.runs.test_config import composed
from tests.retinue.runs.test_resume import assert_a_killed_run_ends_the_same

TEACHER = ("task.teacher.name=deit_tiny", "+task.teacher.patch=4", "+task.teacher.depths=[1]", "task.bits=8")
# A student of EET's, which drops tokens
PRUNED = ("model=deit", "model.size=nano", "model.reduction=eet")


def test_a_run_is_evaluated_and_writes_codes(cli, tmp_path):
    outcome = cli.train(
        "task=hashing", *TEACHER, *PRUNED, "recipe.epochs=1", "trainer.limit_train_batches=2", "hydra.run.dir=run"
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


def test_eets_student_alone_drops_tokens():
    cfg = composed("task=hashing", *TEACHER, *PRUNED, "data.image_size=16")
    datamodule = build_data(cfg)
    task = build_task(cfg, datamodule).train()
    seen: list[int] = []
    for block in task.model.blocks:
        block.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    task.learn_targets(datamodule)
    task.track = lambda *_, **__: None
    batch = {"image": torch.randn(2, 3, 16, 16), "label": torch.tensor([0, 1]), "index": torch.arange(2)}
    task.training_step(batch, 0).backward()
    # The class token and 16 patches, of which a half, a quarter and a sixteenth are kept; the image and the masked one.
    assert seen == 2 * [17, 9, 5, 2]
    assert task.score_patches(batch["image"])[1].shape == (2, 4, 4)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in task.parameters())


def test_data_and_recipes_are_those_of_classification(cli):
    cfg = composed("task=hashing", "data=cifar10", "recipe=eet")
    assert (cfg.task.name, cfg.data.name, cfg.recipe.optimizer.name) == ("hashing", "cifar10", "momentum")
    assert composed("task=hashing").data.name == "digits"
    outcome = cli.train("task=hashing", "data=default_detection")
    assert "data=scenes is for task=detection, not task=hashing" in outcome.error


@pytest.mark.slow
def test_a_killed_run_ends_the_same(tmp_path):
    arguments = (*SWIN, *SMALL, "task=hashing", *TEACHER, "checkpoint.every_steps=1", "hydra.run.dir=run")
    assert_a_killed_run_ends_the_same(arguments, tmp_path)
