"""Two processes, each with half of the batch, train like one process with the whole batch."""

import pytest
import torch
from torch.torch_version import TorchVersion

from tests.retinue.runs.cli import SMALL, SWIN, averages_shards, result, rows, start

# The optimiser is SGD, since Adam turns the rounding error of a tiny gradient into a whole step.
RUN = (
    *SWIN, *SMALL, "recipe.optimizer.name=sgd", "recipe.optimizer.momentum=0.9", "recipe.optimizer.lr=0.05",
    "recipe.optimizer.eps=null", "+model.args.drop_path_rate=0.0", "recipe.ema.decay=null", "hydra.run.dir=run",
)  # fmt: skip


def trained(folder, *arguments):
    # A process of its own, since the first run's process group would remain for the next one.
    run = start("train", *RUN, *arguments, folder=folder)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    return torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True), result(folder / "run")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("single"))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=averages_shards)])
def test_two_processes_equal_one(strategy, single, tmp_path):
    state, wrote = trained(tmp_path, "trainer.devices=2", f"trainer.strategy={strategy}")
    assert state["global_step"] == single[0]["global_step"] > 0
    for key, value in single[0]["state_dict"].items():
        if value.is_floating_point():
            error = (value - state["state_dict"][key]).norm() / value.norm().clamp_min(1e-3)
            assert error < 1e-4, (key, float(error))
    assert wrote["metrics"]["test/n"] == single[1]["metrics"]["test/n"] == 357
    assert abs(wrote["metrics"]["test/loss"] - single[1]["metrics"]["test/loss"]) < 1e-3


@pytest.mark.slow
def test_auxiliary_losses_and_their_log_are_those_of_one_process(tmp_path):
    mixers = "model.mixers=[[{name:sparsifiner,size:4},{name:full,diversity:2.0}]]"
    losses = ("model=deit", "model.size=nano", mixers, "trainer.accumulate_grad_batches=2", "data.image_size=16")
    states, logs = [], []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        state, _ = trained(folder, *losses, f"trainer.devices={devices}", "trainer.strategy=ddp")
        states.append(state["state_dict"])
        logs.append(rows(folder / "run/metrics.csv"))
    for key, value in states[0].items():
        assert torch.allclose(value, states[1][key], atol=1e-4), key
    for name in ("train/connectivity", "train/diversity"):
        values = [[float(row[name]) for row in log if row[name]] for log in logs]
        assert values[0] and values[0] == pytest.approx(values[1], rel=1e-3)
    assert not [name for name in logs[0][0] if name in ("val/connectivity", "val/diversity")]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=averages_shards)])
def test_the_margin_loss_compares_the_images_of_all_processes(strategy, tmp_path):
    margin = ("recipe.augment.repeats=3", "task.margin_loss=0.5")
    states, logs = [], []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        state, _ = trained(folder, *margin, f"trainer.devices={devices}", f"trainer.strategy={strategy}")
        states.append(state["state_dict"])
        logs.append(rows(folder / "run/metrics.csv"))
    for key, value in states[0].items():
        assert torch.allclose(value, states[1][key], atol=1e-4), key
    assert float(states[0]["margin.boundary"]) != 1.2
    values = [[float(row["train/margin"]) for row in log if row["train/margin"]] for log in logs]
    assert values[0] and values[0] == pytest.approx(values[1], rel=1e-3)


def test_sharding_on_cpus_needs_a_torch_that_averages(cli, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.8.0+cu128"))
    outcome = cli.train("trainer.strategy=fsdp", "trainer.devices=2", "recipe.ema.decay=null")
    assert "trainer.strategy=fsdp on CPUs needs torch 2.11 or newer, not 2.8.0+cu128" in outcome.error
