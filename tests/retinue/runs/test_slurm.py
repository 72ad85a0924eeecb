"""Sweeps as jobs of a real Slurm: the one node of scripts/local_slurm."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from retinue.runs.config import register_resolvers
from retinue.runs.many import train_all
from retinue.runs.result_file import read_result
from retinue.runs.slurm import code_newer_than, list_jobs
from retinue.runs.status import status
from retinue.utils.paths import PROJECT
from tests.retinue.runs.cli import SMALL, SWIN, result, start

pytestmark = pytest.mark.skipif(shutil.which("sbatch") is None, reason="Slurm is not installed (sbatch)")

SLURM = ("-m", "hydra/launcher=slurm_local", *SWIN, *SMALL)
# This run trains for some ten seconds.
LONG = ("recipe.epochs=3", "trainer.limit_train_batches=40", "checkpoint.every_steps=10")


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory):
    """Start a cluster for this test process alone."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_SLURM_DIR", f"/tmp/slurm-test-{os.getpid()}")
        patch.setenv("LOCAL_SLURM_PORT", str(27017 + 2 * worker + os.getpid() % 400 * 20))
        script = PROJECT / "scripts/local_slurm"
        started = subprocess.run([script / "start"], capture_output=True, text=True, timeout=400)
        assert started.returncode == 0, started.stderr
        patch.setenv("SLURM_CONF", started.stdout.strip().split("=", 1)[1])
        yield
        subprocess.run([script / "stop"], check=True, capture_output=True, timeout=100)


def sweep(folder, *arguments, code=0):
    """Run a sweep and return the launcher's lines; fails if its exit code is not `code`."""
    process = start("train", *SLURM, *arguments, folder=folder)
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, out + err + logs(folder)
    return err


def submit(folder, *arguments, flags=()):
    """Start a sweep of one run, and return the launcher, the run's folder and the id of its job."""
    launcher = start("train", *flags, *SLURM, *arguments, folder=folder)
    [record] = wait_for(lambda: list(folder.glob("outputs/*/*/*/*/submitted.json")), launcher)
    return launcher, record.parent, json.loads(record.read_text())["job"]


def wait_for(condition, process=None, seconds=100):
    """Return the value of `condition()` as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited too long"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)
    return value


def ended(launcher, folder, code=0):
    out, err = launcher.communicate(timeout=200)
    assert launcher.returncode == code, out + err + logs(folder)
    return err


def logs(folder):
    return "\n".join(path.read_text() for path in sorted(folder.rglob("*log.err")))


def scontrol(*arguments):
    return subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=60).stdout


def weights(run):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Train the LONG run without Slurm and without a stop, and return its folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = start("train", *SWIN, *SMALL, *LONG, "hydra.run.dir=run", folder=folder)
    _, err = run.communicate(timeout=200)
    assert run.returncode == 0, err
    return folder / "run"


def test_a_sweep_of_two_by_two_can_be_run_again(tmp_path):
    grid = ("weights=null,start.pth", "seed=0,1")
    # start.pth does not exist yet, so half of the runs fail.
    err = sweep(tmp_path, *grid, code=2)
    assert err.splitlines()[-1] == "error: 2 of 4 runs did not finish; the same command tries them again"
    assert len(re.findall(r"^job (\d+)_[0-3]: outputs/", err, re.MULTILINE)) == 4  # one array
    runs = [path.parent for path in tmp_path.glob("outputs/classification/digits/swin_nano/*/submitted.json")]
    states = {run: status(run) for run in runs}
    assert sorted(state for state, _ in states.values()) == ["failed", "failed", "finished", "finished"]
    assert all("start.pth" in detail for state, detail in states.values() if state == "failed")
    stamps = {run: (run / "result.json").stat().st_mtime_ns for run in runs if states[run].state == "finished"}

    [finished, *_] = stamps
    shutil.copy(finished / "checkpoints/best.ckpt", tmp_path / "start.pth")
    err = sweep(tmp_path, *grid)
    assert len(re.findall(r"^job ", err, re.MULTILINE)) == 2 and len(re.findall(r"^finished: ", err, re.MULTILINE)) == 4
    # The content of a weights file counts, so the file that is there now makes two new runs.
    runs = [path.parent for path in tmp_path.glob("outputs/classification/digits/swin_nano/*/result.json")]
    assert len(runs) == 4 and all(result(run)["status"] == "finished" for run in runs)
    assert not any((run / "failed.json").exists() for run in runs)
    assert {run: (run / "result.json").stat().st_mtime_ns for run in stamps} == stamps


def test_a_preempted_run_ends_like_an_undisturbed_run(tmp_path, undisturbed):
    launcher, run, job = submit(tmp_path, *LONG)
    wait_for((run / "checkpoints/previous.ckpt").exists, launcher)
    urgent = scontrol("sbatch", "--parsable", "--partition=urgent", "--cpus-per-task=2", "--output=/dev/null",
                      "--wrap=sleep 1").strip()  # fmt: skip
    ended(launcher, tmp_path)
    assert "Restarts=1" in scontrol("scontrol", "show", "job", job) and urgent
    said = logs(tmp_path)
    assert "stopped by SIGTERM at step" in said and "going on from" in said
    assert_same_weights(run, undisturbed)
    assert result(run)["metrics"] == result(undisturbed)["metrics"]
    assert len((run / "metrics.csv").read_text().splitlines()) == len(
        (undisturbed / "metrics.csv").read_text().splitlines()
    )
    assert not list(run.rglob("hpc_ckpt*"))


def test_a_run_goes_back_to_the_queue_before_its_time_limit_but_not_for_ever(tmp_path, undisturbed):
    """The test sends the signal that Slurm would send, since a time limit of Slurm is at least a minute."""
    launcher, run, job = submit(tmp_path, *LONG, "hydra.launcher.max_num_timeout=1")
    wait_for((run / "checkpoints/previous.ckpt").exists, launcher)
    scontrol("scancel", "--signal=USR2", job)
    wait_for(lambda: "going on from" in logs(tmp_path), launcher)
    assert status(run).state == "running"
    assert "back in the queue: restart 1 of at most 1" in logs(tmp_path)
    scontrol("scancel", "--signal=USR2", job)
    err = ended(launcher, tmp_path, code=2)
    assert "failed: " in err and "out of time after 1 restarts (hydra.launcher.max_num_timeout=1)" in err
    assert read_result(run) is None

    sweep(tmp_path, *LONG, "hydra.launcher.max_num_timeout=1")
    assert_same_weights(run, undisturbed)


def test_a_killed_run_is_reported_and_no_other_process_may_train_it_before(tmp_path, cli):
    # So many epochs that the run is under way for as long as the test needs, on a busy machine too.
    endless = (*LONG, "recipe.epochs=100")
    launcher, run, job = submit(tmp_path, *endless)
    wait_for((run / "checkpoints/previous.ckpt").exists, launcher)
    config = (run / "config.yaml").read_text()
    error = cli.train(*endless, f"hydra.run.dir={run}").error
    assert f"{run} is being trained by process" in error
    assert status(run).state == "running" and (run / "config.yaml").read_text() == config
    assert not (run / "failed.json").exists()
    scontrol("scancel", "--signal=KILL", job)
    err = ended(launcher, tmp_path, code=2)
    assert f"job {job} ended without a result" in err
    assert status(run).state == "failed"


@pytest.mark.slow
def test_two_slurm_tasks_train_like_two_local_processes(tmp_path):
    ddp = ("trainer.strategy=ddp", "trainer.devices=2", "recipe.epochs=1")
    sweep(tmp_path, *ddp)
    [run] = [path.parent for path in tmp_path.glob("outputs/*/*/*/*/result.json")]
    assert len(list(tmp_path.rglob("*_log.err"))) == 2  # one of each task
    local = start("train", "-m", *SWIN, *SMALL, *ddp, "seed=0,1", "hydra.sweep.dir=local", folder=tmp_path)
    _, err = local.communicate(timeout=200)
    assert local.returncode == 0, err
    # Each run of the sweep is started once.
    assert err.count("epoch 1/1") == 2
    assert_same_weights(run, tmp_path / "local" / run.relative_to(tmp_path / "outputs"))


def test_a_run_keeps_the_config_of_its_submission(tmp_path):
    recipe = tmp_path / "own/recipe/mine.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("defaults: [small_data]\nclip_grad: 5.0\n")
    launcher, run, job = submit(
        tmp_path, "recipe=mine", "+hydra.launcher.additional_parameters.hold=true", flags=["--config-dir=own"]
    )
    assert status(run, list_jobs()).state == "queued"
    recipe.write_text("defaults: [small_data]\nclip_grad: 1.0\n")
    scontrol("scontrol", "release", job)
    ended(launcher, tmp_path)
    assert OmegaConf.load(run / "config.yaml").recipe.clip_grad == 5.0
    assert "conf/ has changed to recipe.clip_grad=1.0, not 5.0; the run is trained as submitted" in logs(tmp_path)


def test_code_that_changed_since_the_submission_is_named():
    assert "ops/registry.py" in code_newer_than(0)
    assert code_newer_than(time.time() + 60) == []


def test_without_slurm_the_launcher_is_an_error(cli, monkeypatch):
    error = cli("train", "hydra/launcher=slurm").error
    assert "hydra/launcher=slurm needs -m, also for a single run" in error
    monkeypatch.setenv("PATH", "/nowhere")
    error = cli("train", "-m", "hydra/launcher=slurm").error
    assert "needs Slurm's sbatch, which is not installed; scripts/local_slurm/start starts" in error
    assert cli.files() == ["outputs/multirun.yaml"]


@pytest.mark.slow
def test_runs_that_are_no_grid_are_jobs_and_a_failed_one_has_its_reason(tmp_path, monkeypatch):
    """Train two nets of different widths and one with a wrong width as jobs, as compare_ops.py does."""
    monkeypatch.chdir(tmp_path)
    register_resolvers()
    common = [*SWIN, *SMALL, "hydra.launcher.timeout_min=5"]
    runs = {
        "narrow": [*common, "++model.args.dim=16"],
        "wide": [*common, "++model.args.dim=24", "seed=1"],
        "wrong": [*common, "++model.args.dim=0"],
    }
    ended = train_all(runs, tmp_path / "runs", "slurm_local")
    assert [json.loads(Path(ended[name], "result.json").read_text())["seed"] for name in ("narrow", "wide")] == [0, 1]
    assert isinstance(ended["wrong"], str) and "Error" in ended["wrong"]
    # Without the launcher the finished runs are taken as they are.
    again = train_all({name: runs[name] for name in ("narrow", "wide")}, tmp_path / "runs")
    assert again == {name: ended[name] for name in again}
