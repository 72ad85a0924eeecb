"""Keys of training that are off by default, in whole runs; the definitions are tested in tests/retinue/tasks."""

import json
import math
import signal
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from retinue.tasks.base import Task
from retinue.tasks.classification import Classification
from scripts.merge_weights import main as merge_weights
from tests.retinue.runs.cli import SMALL, SWIN, averages_shards, result, rows, start, stop_when
from tests.retinue.runs.test_resume import RUN, assert_a_killed_run_ends_the_same

# The smallest of the nets: runs of it take seconds.
NET = ("model=deit", "model.size=nano", "+model.args.depths=[2]")


def load(path: Any) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def test_validations_the_best_epochs_their_mean_and_the_norm_of_gradients(cli, monkeypatch):
    norms, log = [], Task.on_before_optimizer_step

    def record(self, optimizer):
        squares = [parameter.grad.double().square().sum() for parameter in self.parameters()]
        norms.append(math.sqrt(sum(map(float, squares))))
        log(self, optimizer)

    monkeypatch.setattr(Task, "on_before_optimizer_step", record)
    outcome = cli.train(
        "hydra.run.dir=run", "recipe.epochs=5", "recipe.val_every=2", "recipe.average_best=2",
        "task.log_grad_norm=true", "trainer.limit_train_batches=2", "trainer.accumulate_grad_batches=2",
        "trainer.limit_val_batches=1", *NET,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    log_rows = rows("run/metrics.csv")
    validated = {int(row["epoch"]): float(row["val/top1"]) for row in log_rows if row["val/top1"]}
    assert set(validated) == {2, 4, 5}
    best = sorted(validated, key=lambda epoch: (-validated[epoch], epoch))[:2]
    wrote = result(cli.folder / "run")
    assert wrote["averaged_epochs"] == best
    folder = cli.folder / "run/checkpoints"
    assert {path.name for path in folder.glob("epoch-*")} == {f"epoch-{epoch:04}.ckpt" for epoch in best}
    merged, states = load_file(folder / "average.safetensors"), [load(folder / f"epoch-{n:04}.ckpt") for n in best]
    for name, value in merged.items():
        values = [state["state_dict"][f"model.{name}"] for state in states]
        expected = torch.stack(values).double().mean(0) if value.is_floating_point() else values[0]
        torch.testing.assert_close(value.double(), expected.double(), rtol=1e-6, atol=1e-7)
    assert [float(row["train/grad_norm"]) for row in log_rows] == pytest.approx(norms, rel=1e-5)

    assert cli("eval", "run=run", "hydra.run.dir=evaluation", "trainer.accelerator=cpu").code == 0
    tested = result(cli.folder / "evaluation")
    assert tested["weights"].endswith("average.safetensors")
    assert tested["metrics"]["test/loss"] == pytest.approx(wrote["metrics"]["test/loss"], rel=1e-6)


def test_the_batch_whose_loss_is_not_finite_is_written_as_the_net_received_it(cli, monkeypatch):
    step, seen = Classification.training_step, {}

    def spoil(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        seen[self.current_epoch, batch_idx] = batch["image"].clone(), batch["index"].clone()
        if (self.current_epoch, batch_idx) >= (1, 2):
            self.track(loss * math.nan, 1)
        return loss

    monkeypatch.setattr(Classification, "training_step", spoil)
    outcome = cli.train(*NET, "hydra.run.dir=run", "recipe.augment.mixup=0.5", "trainer.accumulate_grad_batches=2")
    # Epochs have 5 batches, hence 3 steps.
    assert "the loss is not finite at step 4" in outcome.error and "not_finite/rank0.safetensors" in outcome.error
    with safe_open(cli.folder / "run/not_finite/rank0.safetensors", "pt") as file:
        facts = file.metadata()
        image, index = (file.get_tensor(name) for name in ("image", "index"))
    assert (facts["epoch"], facts["batch"], facts["step"]) == ("1", "2", "4")
    assert torch.equal(image, seen[1, 2][0]) and torch.equal(index, seen[1, 2][1])
    assert json.loads(facts["names"]) == [f"digits/train/{position:05}" for position in index.tolist()]
    assert (cli.folder / "run/checkpoints/best.ckpt").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("recipe.clip_mode=agc",), "recipe.clip_mode=agc needs recipe.clip_grad"),
        (("recipe.schedule.kind=plateau",), "recipe.schedule.kind=plateau needs recipe.schedule.patience"),
        (
            ("recipe.clip_mode=agc", "recipe.clip_grad=0.01", "trainer.strategy=fsdp"),
            "trainer.strategy=fsdp has no recipe.clip_mode=agc",
        ),
        (("recipe.average_best=1",), "recipe.average_best must be a whole number, 2 or more, or null, not 1"),
        (
            ("recipe.augment.sizes=[8,16]", "task.compile=reduce-overhead"),
            "task.compile=reduce-overhead is for one image size",
        ),
        (
            ("model=timm", "model.name=vit_tiny_patch16_224", "recipe.augment.sizes=[32,16]"),
            "recipe.augment.sizes: the net takes no images of 32 px",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_one_line(cli, arguments, says):
    assert says in cli.train(*arguments).error
    assert cli.files() == []


EPOCHS = ("checkpoint.every_steps=null", "recipe.epochs=6")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        (
            "recipe.schedule.kind=plateau", "+recipe.schedule.gamma=0.5", "+recipe.schedule.patience=0",
            "recipe.schedule.warmup_epochs=0", *EPOCHS,
        ),
        ("recipe.augment.sizes=[8,12,16]",),
        ("recipe.augment.sizes=[8,12,16]", "recipe.augment.size_by=step", "data.num_workers=2"),
        ("recipe.average_best=2", "checkpoint.top_k=3", "recipe.val_every=2", *EPOCHS),
        ("recipe.optimizer.name=muon", "task.log_grad_norm=true"),
    ],
    ids=["plateau", "sizes", "sizes by step", "top k", "muon"],
)  # fmt: skip
def test_a_killed_run_ends_the_same(arguments, tmp_path):
    assert_a_killed_run_ends_the_same((*RUN, *arguments, "hydra.run.dir=run"), tmp_path)


SHARDED = (
    *SWIN, *SMALL, "recipe.optimizer.name=sgd", "recipe.optimizer.momentum=0.9", "recipe.optimizer.lr=0.05",
    "recipe.optimizer.eps=null", "+model.args.drop_path_rate=0.0", "recipe.ema.decay=0.8", "recipe.ema.warmup=false",
    "task.log_grad_norm=true", "recipe.epochs=3", "hydra.run.dir=run",
)  # fmt: skip


@pytest.mark.slow
@averages_shards
def test_an_average_of_sharded_weights_is_that_of_one_process_and_goes_on_after_a_kill(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = start("train", *SHARDED, folder=tmp_path / "one")
    _, err = one.communicate(timeout=400)
    assert one.returncode == 0, err
    two = (*SHARDED, "trainer.devices=2", "trainer.strategy=fsdp")
    run = start("train", *two, folder=tmp_path / "two")
    assert stop_when(run, tmp_path / "two/run/checkpoints/best.ckpt", signal.SIGTERM) == 128 + signal.SIGTERM
    assert load(tmp_path / "two/run/checkpoints/last.ckpt")["global_step"] < 15
    again = start("train", *two, folder=tmp_path / "two")
    _, err = again.communicate(timeout=400)
    assert again.returncode == 0 and "going on from" in err, err
    states = [load(tmp_path / name / "run/checkpoints/last.ckpt") for name in ("one", "two")]
    assert states[0]["averaging_state"] == states[1]["averaging_state"]
    for section in ("state_dict", "current_model_state"):
        assert states[0][section].keys() == states[1][section].keys()
        for key, value in states[0][section].items():
            if value.is_floating_point():
                error = (value - states[1][section][key]).norm() / value.norm().clamp_min(1e-3)
                assert error < 1e-4, (section, key, float(error))
    logs = [rows(tmp_path / name / "run/metrics.csv") for name in ("one", "two")]
    for name in ("train/grad_norm", "val/loss"):
        assert [float(row[name]) for row in logs[0]] == pytest.approx([float(row[name]) for row in logs[1]], rel=1e-4)


@pytest.mark.slow
def test_a_greedy_soup_of_runs_is_validated_and_can_be_evaluated(cli, capfd):
    for seed in range(3):
        assert cli.train(f"seed={seed}", f"hydra.run.dir=run{seed}", "recipe.epochs=3").code == 0
    merge_weights(["run0", "run1", "run2", "method=greedy", "save=soup.safetensors"])
    lines = capfd.readouterr().out.splitlines()
    figures = [float(line.split("val/top1 ")[1].split()[0]) for line in lines[:4]]
    assert figures[3] >= max(figures[:3])
    best = torch.load("run0/checkpoints/best.ckpt", weights_only=True)
    assert figures[0] == pytest.approx(best["callbacks"]["Checkpoints"]["best"], abs=5e-5)
    assert cli("eval", "run=run0", "weights=soup.safetensors", "trainer.accelerator=cpu").code == 0
