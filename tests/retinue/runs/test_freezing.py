"""Runs that freeze parts of the net."""

import pytest
import torch

from tests.retinue.runs.cli import SMALL, result, start
from tests.retinue.runs.test_resume import assert_a_killed_run_ends_the_same

CNN = ("model=timm", "model.name=resnet10t", "+model.args.drop_path_rate=0.2", "recipe.freeze=[stem,stage1,norms]")


def test_a_run_keeps_frozen_weights_and_statistics_and_counts_the_others(cli):
    outcome = cli.train("model=timm", "model.name=resnet10t", "hydra.run.dir=start", "recipe.epochs=1")
    assert outcome.code == 0, outcome.err
    weights = "weights=start/checkpoints/last.ckpt"
    outcome = cli.train(*CNN, weights, "hydra.run.dir=run")
    assert outcome.code == 0 and "re-estimated" not in outcome.err, outcome.err
    before, after = (
        torch.load(cli.folder / run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in ("start", "run")
    )
    kept = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {name for name in before if "bn" in name or name.startswith(("model.conv1", "model.layer1"))}
    assert frozen <= kept and "model.layer2.0.conv1.weight" not in kept
    finished = result(cli.folder / "run")
    assert 0 < finished["trainable_params"] < finished["params"]
    assert "trainable_params" not in result(cli.folder / "start")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("backbone", "recipe.freeze must be a list of backbone, norms, stem, stage1, block1, stage1-2 and the like"),
        ("[stages]", "recipe.freeze must be a list of backbone, norms, stem, stage1, block1, stage1-2 and the like"),
        ("[stage5]", "recipe.freeze: Swin has no part 'stage5'. Did you mean 'stage"),
    ],
)
def test_a_wrong_part_is_one_line(value, message, cli):
    assert message in cli.train(f"recipe.freeze={value}").error
    assert not cli.files()


@pytest.mark.slow
def test_a_killed_run_with_frozen_parts_ends_the_same(tmp_path):
    command = (*CNN, *SMALL, "recipe.epochs=3", "checkpoint.every_steps=1", "hydra.run.dir=run")
    assert_a_killed_run_ends_the_same(command, tmp_path)


@pytest.mark.slow
def test_two_processes_keep_frozen_statistics(tmp_path):
    command = (*CNN, *SMALL, "trainer=cpu", "trainer.devices=2", "trainer.strategy=ddp", "recipe.epochs=1")
    run = start("train", *command, "hydra.run.dir=run", folder=tmp_path)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(not value.any() for name, value in state.items() if name.endswith("running_mean"))
