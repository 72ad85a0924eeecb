"""Joint-embedding pretraining from the command line: resumed after a kill, and in two processes."""

import pytest
import torch

from tests.retinue.runs.cli import SMALL, result, rows, start
from tests.retinue.runs.test_resume import assert_a_killed_run_ends_the_same

RUN = (
    *SMALL, "task=pretraining", "model=deit", "model.size=nano", "+model.args.depths=[1]", "recipe.batch_size=16",
    "hydra.run.dir=run",
)  # fmt: skip
EXACT = (
    "recipe.optimizer.name=sgd", "recipe.optimizer.momentum=0.9", "recipe.optimizer.lr=0.01",
    "recipe.optimizer.eps=null", "+model.args.drop_path_rate=0.0",
)  # fmt: skip


def test_a_method_with_a_teacher_trains_and_is_evaluated(cli, tmp_path):
    outcome = cli("train", *RUN, "method=dino", "trainer.limit_train_batches=2", "task.bank=64")
    assert outcome.code == 0, outcome.err
    wrote = result(tmp_path / "run")
    assert (wrote["task"], wrote["method"], wrote["metrics"]["test/n"]) == ("pretraining", "dino", 357)
    assert all(float(row["train/loss"]) > 0 for row in rows(tmp_path / "run/metrics.csv"))
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert state["model.center"].any()
    # The teacher is behind the net that is trained.
    names = [key.removeprefix("model.student.") for key in state if key.startswith("model.student.backbone.")]
    assert names and any(not torch.equal(state[f"model.{key}"], state[f"model.student.{key}"]) for key in names)


@pytest.mark.slow
def test_further_training_begins_with_equal_copies(cli, tmp_path):
    outcome = cli("train", *RUN, "method=moco_v3", "recipe.epochs=1", "trainer.limit_train_batches=1")
    assert outcome.code == 0, outcome.err
    weights = tmp_path / "run/checkpoints/last.ckpt"
    still = ("recipe.optimizer.lr=1e-12", "recipe.schedule.min_lr=0", "recipe.schedule.warmup_lr=0")
    outcome = cli(
        "train", *RUN, "method=dino", f"weights={weights}", *still, "recipe.epochs=1",
        "trainer.limit_train_batches=1", "method.views.local.number=1", "hydra.run.dir=further",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    before, after = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("run", "further")
    )
    name = "backbone.blocks.0.mlp.fc1.weight"
    for copy in ("model.", "model.student."):
        torch.testing.assert_close(after[copy + name], before["model." + name])


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("method=simclrr", "simclr"),
        ("method.views.pair.colours.blur=2", "method.views.pair.colours.blur"),
        ("method.temperature=cold", "method.temperature must be a number above 0 or adaptive"),
    ],
)
def test_wrong_choices_are_refused_in_one_line(argument, said, cli):
    first = () if argument.startswith("method=") else ("method=simclr",)
    assert said in cli("train", *RUN, *first, argument).error


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "amcl_moco_v3", "dino", "lejepa", "vicreg"])
def test_a_killed_run_ends_the_same(method, tmp_path):
    arguments = (*RUN, f"method={method}", "checkpoint.every_steps=1")
    assert_a_killed_run_ends_the_same(arguments, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["amcl_simclr", "moco_v3", "dino", "lejepa"])
def test_two_processes_equal_one(method, tmp_path):
    states = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        arguments = (f"method={method}", f"trainer.devices={devices}", "trainer.strategy=ddp")
        run = start("train", *RUN, *EXACT, *arguments, folder=folder)
        _, err = run.communicate(timeout=400)
        assert run.returncode == 0, err
        states.append(torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"])
    for key, value in states[0].items():
        if value.is_floating_point():
            error = (value - states[1][key]).norm() / value.norm().clamp_min(1e-3)
            assert error < 1e-3, (key, float(error))
