"""A run that is stopped, in whatever way, ends with the same result as an undisturbed run."""

import signal

import pytest
import torch

from tests.retinue.runs.cli import SMALL, SWIN, result, rows, run_here, start, stop_when

# Dropout, mixup and drop path draw random numbers; accumulation and the average of the weights carry state.
RUN = (
    *SWIN, *SMALL, "recipe.epochs=3", "trainer.limit_train_batches=8", "trainer.accumulate_grad_batches=2",
    "recipe.augment.mixup=0.8", "recipe.augment.cutmix=1.0", "recipe.augment.erasing=0.25",
    "recipe.augment.auto_augment=rand-m9-mstd0.5-inc1", "+model.args.drop_path_rate=0.2", "+model.args.drop_rate=0.1",
    "checkpoint.every_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Train without a stop, and return the run's folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        assert run_here("train", *RUN, "hydra.run.dir=run", monkeypatch=monkeypatch) == 0
    return folder / "run"


def assert_a_killed_run_ends_the_same(arguments, folder):
    """Run a training twice below `folder`, once killed and resumed, and compare the two runs."""
    whole, killed = (folder / name for name in ("whole", "killed"))
    for place in (whole, killed):
        place.mkdir()
    run = start("train", *arguments, folder=whole)
    _, err = run.communicate(timeout=400)
    assert run.returncode == 0, err
    run = start("train", *arguments, folder=killed)
    assert stop_when(run, killed / "run/checkpoints/previous.ckpt", signal.SIGKILL) == -signal.SIGKILL
    again = start("train", *arguments, folder=killed)
    _, err = again.communicate(timeout=400)
    assert again.returncode == 0 and "going on from" in err, err
    assert_same_run(whole / "run", killed / "run")


def assert_same_run(one, other):
    for name in ("last", "best"):
        a, b = (torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True) for folder in (one, other))
        assert a["global_step"] == b["global_step"]
        # Without an average of the weights there is one state alone.
        for section in {"state_dict", "current_model_state"} & (a.keys() | b.keys()):
            assert a[section].keys() == b[section].keys()
            for key in a[section]:
                assert torch.equal(a[section][key], b[section][key]), (name, section, key)
    metrics_a, metrics_b = (result(folder)["metrics"] for folder in (one, other))
    assert metrics_a == metrics_b
    rows_a, rows_b = (rows(folder / "metrics.csv") for folder in (one, other))
    speed = "train/images_per_second"
    assert [row | {speed: ""} for row in rows_a] == [row | {speed: ""} for row in rows_b]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_within_an_epoch_ends_the_same(workers, undisturbed, cli, tmp_path):
    command = (*RUN, f"data.num_workers={workers}", "hydra.run.dir=run")
    killed = start("train", *command, folder=tmp_path)
    # previous.ckpt exists once a second checkpoint is written, so at least one step of the first epoch is done.
    assert stop_when(killed, tmp_path / "run/checkpoints/previous.ckpt", signal.SIGKILL) == -signal.SIGKILL
    step = torch.load(tmp_path / "run/checkpoints/previous.ckpt", weights_only=True)["global_step"]
    assert step % 4, "killed at the end of an epoch"
    assert not (tmp_path / "run/result.json").exists()
    again = cli("train", *command)
    assert again.code == 0 and "going on from" in again.err, again.err
    assert_same_run(undisturbed, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_run_that_a_signal_stops_ends_the_same(number, undisturbed, cli, tmp_path):
    command = (*RUN, "checkpoint.every_steps=null", "hydra.run.dir=run")
    stopped = start("train", *command, folder=tmp_path)
    # best.ckpt exists once the first epoch has ended, so the second epoch is under way.
    code = stop_when(stopped, tmp_path / "run/checkpoints/best.ckpt", number)
    assert code == 128 + number
    assert f"stopped by {number.name} at step" in stopped.communicate()[1]
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert 4 <= state["global_step"] < 12
    again = cli("train", *command)
    assert again.code == 0, again.err
    assert_same_run(undisturbed, tmp_path / "run")


def test_a_truncated_last_checkpoint_is_replaced_by_the_previous_one(undisturbed, cli, tmp_path):
    command = (*RUN, "hydra.run.dir=run")
    killed = start("train", *command, folder=tmp_path)
    stop_when(killed, tmp_path / "run/checkpoints/previous.ckpt", signal.SIGKILL)
    last = tmp_path / "run/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:5000] if last.exists() else b"")
    again = cli("train", *command)
    assert again.code == 0, again.err
    assert "last.ckpt cannot be read" in again.err and "previous.ckpt, step" in again.err
    assert_same_run(undisturbed, tmp_path / "run")
