"""Faults of disks, folders, processes and files end in one line that names the file and the remedy."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback

import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from retinue.results.collection import find_runs
from retinue.runs.checkpoints import WHOLE, find_resume
from retinue.runs.result_file import read_result
from retinue.runs.status import status
from retinue.utils.errors import Stopped, stopping_on_sigterm, user_errors
from retinue.utils.paths import PROJECT
from tests.retinue.runs.cli import SMALL, SWIN
from tests.scripts.run_folders import fail, make_run

QUICK = ("recipe.epochs=1", "trainer.limit_train_batches=2")
EVAL = ("trainer.accelerator=cpu", "data.num_workers=0")
GARBAGE = b"\x00\xff{["


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def run(cli, finished):
    """Return the folder of a finished run, a copy that the test may change."""
    kept = finished / "run"
    if not kept.exists():
        assert cli.train(*QUICK, "hydra.run.dir=run").code == 0
        shutil.move("run", kept)
    shutil.copytree(kept, "run")
    return cli.folder / "run"


@pytest.fixture
def full_disk(tmp_path_factory):
    """Mount a small file system without any room left, and return its folder."""
    folder = tmp_path_factory.mktemp("full")
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(OSError, match="No space"), open(folder / "filling", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line(cli, full_disk, run):
    commands = (
        ("train", *SWIN, *SMALL, *QUICK, f"hydra.run.dir={full_disk}/run"),
        ("train", "-m", *SWIN, *SMALL, *QUICK, f"hydra.sweep.dir={full_disk}/sweep"),
        ("eval", "run=run", *EVAL, f"hydra.run.dir={full_disk}/evaluated"),
        ("scripts/collect", "folder=run", f"out={full_disk}/table.csv"),
        ("scripts/collect", "folder=run", f"out={full_disk}/table.md"),
        ("scripts/report", "folder=run", f"out={full_disk}/report.html"),
    )
    for command in commands:
        error = cli(*command).error
        assert "No space left on device; make room" in error, command
        # Hydra writes multirun.yaml, and an error of its does not name the file.
        assert str(full_disk) in error or "-m" in command, command
    left = [path.name for path in full_disk.rglob("*") if path.is_file() and path.stat().st_size]
    assert left == ["filling"]


def test_a_path_that_is_a_file_or_cannot_be_written_is_one_line(cli, run):
    (cli.folder / "file").write_text("text")
    for place, reason in (("file", "a file stands where a folder is needed"),
                          ("file/x", "a file stands where a folder is needed"),
                          ("/sys/retinue/run", "")):  # fmt: skip
        train = cli.train(*QUICK, f"hydra.run.dir={place}").error
        evaluation = cli("eval", "run=run", *EVAL, f"hydra.run.dir={place}").error
        assert place.split("/x")[0].removesuffix("/run") in train and reason in train
        assert place.split("/x")[0].removesuffix("/run") in evaluation and reason in evaluation
    for script, out in (("collect", "run.csv"), ("report", "run.html")):
        os.mkdir(out)
        error = cli(f"scripts/{script}", "folder=run", f"out={out}").error
        assert f"{out}: Is a directory; a folder stands where a file is needed" in error
        assert "file" in cli(f"scripts/{script}", "folder=run", f"out=file/{out}").error
    assert (cli.folder / "file").read_text() == "text"


def test_a_loading_process_that_is_killed_is_one_line(cli, monkeypatch):
    from datamodules.loader import BatchFetcher

    monkeypatch.setattr(BatchFetcher, "__getitem__", lambda self, plan: os.kill(os.getpid(), signal.SIGKILL))
    error = cli.train(*QUICK, "hydra.run.dir=run", "data.num_workers=1").error
    assert "DataLoader worker (pid" in error and "take a smaller data.num_workers" in error
    assert "DataLoader worker" in status(cli.folder / "run").detail


def test_a_folder_that_is_removed_under_way_is_one_line(cli, monkeypatch):
    from retinue.tasks.classification import Classification

    end = Classification.on_validation_epoch_end

    def remove(self):
        end(self)
        shutil.rmtree("run")

    monkeypatch.setattr(Classification, "on_validation_epoch_end", remove)
    assert "run/metrics.csv: No such file or directory" in cli.train(*QUICK, "hydra.run.dir=run").error
    monkeypatch.setattr("retinue.runs.loggers.MetricsCSV.log_metrics", lambda *args: None)
    assert "run/config.yaml was removed while the run was under way" in cli.train(*QUICK, "hydra.run.dir=run").error
    assert cli.files() == []


@pytest.mark.parametrize("content", [GARBAGE, b"", b"seed: 0\n", b"- 1\n", b"task: {name: classification"])
def test_a_damaged_config_is_one_line(cli, run, content):
    (run / "config.yaml").write_bytes(content)
    for command in (("train", *SWIN, *SMALL, *QUICK, "hydra.run.dir=run"), ("eval", "run=run", *EVAL)):
        error = cli(*command).error
        assert "run/config.yaml cannot be read" in error and "rerun=true" in error
    make_run(cli.folder / "outputs", "swin", 0, 0.5)
    shutil.move("run", "outputs/run")
    assert cli("scripts/collect").code == cli("scripts/report").code == 0


def test_a_damaged_metrics_table_is_one_line_and_costs_no_result(cli, run):
    (run / "metrics.csv").write_bytes(GARBAGE)
    (run / "result.json").unlink()
    error = cli.train(*QUICK, "hydra.run.dir=run").error
    assert "run/metrics.csv cannot be read" in error and "move it away and start the same command again" in error
    (run / "metrics.csv").unlink()
    assert cli.train(*QUICK, "hydra.run.dir=run").code == 0
    (run / "metrics.csv").write_bytes(GARBAGE)
    assert cli("scripts/collect", "folder=run").code == cli("scripts/report", "folder=run").code == 0


def test_the_checkpoint_of_another_net_is_refused(cli, run):
    (run / "result.json").unlink()
    assert cli.train(*QUICK, "hydra.run.dir=other", "model.mixers=full").code == 0
    good = (run / "checkpoints/last.ckpt").read_bytes()
    foreign = [(cli.folder / "other/checkpoints/last.ckpt").read_bytes()]
    for content in ({"state_dict": {}}, [1], {"global_step": 3}):
        torch.save(content, "foreign.ckpt")
        foreign.append((cli.folder / "foreign.ckpt").read_bytes())
    for name in ("previous.ckpt", "best.ckpt"):
        (run / "checkpoints" / name).unlink(missing_ok=True)
    for content in foreign:
        (run / "checkpoints/last.ckpt").write_bytes(content)
        error = cli.train(*QUICK, "hydra.run.dir=run").error
        assert "run/checkpoints can be read; rerun=true starts anew" in error
    (run / "checkpoints/previous.ckpt").write_bytes(good)
    assert cli.train(*QUICK, "hydra.run.dir=run").code == 0


@pytest.mark.parametrize("name", ["result.json", "failed.json", "submitted.json", "run.lock", "config.yaml"])
@pytest.mark.parametrize("content", [GARBAGE, b"", b"[]", b'{"reason": 3'])
def test_one_damaged_file_does_not_fail_the_others(cli, name, content):
    make_run(cli.folder / "outputs", "swin", 0, 0.5)
    bad = make_run(cli.folder / "outputs", "swin", 1, 0.6)
    if name != "config.yaml":
        (bad / "result.json").unlink()
    (bad / name).write_bytes(content)
    assert len(find_runs(cli.folder / "outputs")) == 2
    for script in ("collect", "report"):
        outcome = cli(f"scripts/{script}")
        assert outcome.code == 0, outcome.err
    state, detail = status(bad)
    if name.endswith(".json"):
        assert state == "unreadable" and name in detail and "remove it" in detail
    fail(bad, "a reason")
    assert cli("scripts/collect").code == 0


def test_sweep_status_goes_on_past_a_damaged_file(cli):
    sweep = (*SWIN, "data.image_size=16", "seed=0,1", "hydra.sweep.dir=swp")
    listed = cli("scripts/sweep_status", *sweep)
    folder = cli.folder / listed.out.splitlines()[1].split()[-1]
    folder.mkdir(parents=True)
    for name in ("failed.json", "submitted.json", "result.json"):
        (folder / name).write_bytes(GARBAGE)
        outcome = cli("scripts/sweep_status", *sweep)
        assert outcome.code == 0 and "1 unreadable, 1 missing" in outcome.out and name in outcome.out
        (folder / name).unlink()


def test_no_truncated_checkpoint_is_accepted(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save(dict.fromkeys(WHOLE, 1) | {"global_step": 7, "state_dict": {"a": torch.rand(2000)}}, path)
    whole = path.read_bytes()
    assert find_resume(tmp_path) == (path, 7)
    rng = random.Random(0)
    for _ in range(1000):
        path.write_bytes(whole[: rng.randrange(len(whole))])
        with pytest.raises(ValueError, match="none of the checkpoints"):
            find_resume(tmp_path)


def test_no_truncated_result_is_accepted(tmp_path):
    folder = make_run(tmp_path, "swin", 0, 0.5)
    path = folder / "result.json"
    whole = path.read_bytes() + b"\n"
    path.write_bytes(whole)
    expected = read_result(folder)
    rng = random.Random(0)
    for _ in range(1000):
        cut = rng.randrange(len(whole))
        path.write_bytes(whole[:cut])
        [run] = find_runs(tmp_path)
        # Without the last newline nothing is missing.
        if cut == len(whole) - 1:
            assert run.result == read_result(folder) == expected
            continue
        assert run.status == status(folder).state == "unreadable"
        with pytest.raises(ValueError, match=r"result\.json cannot be read"):
            read_result(folder)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def start_group(*arguments: str, folder) -> subprocess.Popen:
    """Start train.py as the leader of a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(PROJECT / "train.py"), *arguments], cwd=folder, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "No space left on device: 'a/b'; make room"),
        (ValueError(), "result.json cannot be read"),
        (KeyError("a"), None),
    ],
)
def test_the_error_of_a_rank_is_one_line(tmp_path, capsys, error, line):
    (tmp_path / "result.json").write_text("{")
    try:
        if isinstance(error, ValueError):
            read_result(tmp_path)
        raise error
    except Exception:
        message = f"\n\n-- Process 1 terminated with the following error:\n{traceback.format_exc()}"
    if line is None:
        with pytest.raises(ProcessRaisedException), user_errors():
            raise ProcessRaisedException(message, 1, 2)
        return
    with pytest.raises(SystemExit), user_errors():
        raise ProcessRaisedException(message, 1, 2)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and line in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_a_signal_to_the_process_group_ends_all_processes(tmp_path, number):
    """`timeout` sends SIGTERM to the process and then to its group, which holds the loading processes."""
    command = (
        *SWIN,
        *SMALL,
        "recipe.epochs=200",
        "data.num_workers=2",
        "hydra.run.dir=run",
        "checkpoint.every_steps=1",
    )
    process = start_group(*command, folder=tmp_path)
    assert wait_until((tmp_path / "run/checkpoints/previous.ckpt").exists, 120)
    if number == signal.SIGKILL:
        process.kill()
    else:
        process.send_signal(number)
        os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert wait_until(lambda: not alive(process.pid), 3)
    assert not (tmp_path / "run/failed.json").exists()
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number, err
        lines = [line for line in err.splitlines() if not line.startswith("epoch")]
        assert "saving at the next step" in lines[-2] and len(lines) <= 2 + (len(lines) > 2 and "going on" in lines[0])
        assert lines[-1].startswith(f"stopped by {number.name} at step")


class Signalling:
    """Its finaliser receives SIGTERM, and Python ignores what a finaliser raises."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_in_a_finaliser_stops_the_command():
    began = time.monotonic()
    with pytest.raises(Stopped), stopping_on_sigterm():
        Signalling()
        time.sleep(20)
    assert time.monotonic() - began < 10
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
