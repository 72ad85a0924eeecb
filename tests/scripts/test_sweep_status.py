"""The states of runs, the lock of a run, and the table of a sweep's states."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest

from retinue.runs.config import register_resolvers
from retinue.runs.result_file import read_result
from retinue.runs.status import STATES, attempt, status
from retinue.runs.sweep import list_runs
from retinue.utils.paths import PROJECT
from scripts import sweep_status

SWEEP = (
    "model=swin",
    "model.size=nano",
    "data.image_size=16",
    "recipe.epochs=1,2",
    "seed=0,1,2",
    "hydra.sweep.dir=swp",
)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register_resolvers()
    return [run.folder for run in list_runs(SWEEP)]


@contextmanager
def held_by_another_process(folder):
    """Let another process hold the run; yields its process id."""
    code = (
        "from pathlib import Path; from retinue.runs.status import attempt\n"
        f"with attempt(Path({str(folder)!r})): print(); input()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROJECT) as process:
        assert process.stdout and process.stdout.readline() == "\n"
        yield process.pid
        process.communicate("\n")


def fail(folder, error):
    with pytest.raises(type(error)), attempt(folder):
        (folder / "config.yaml").touch()
        raise error


def test_the_folder_tells_every_state_of_a_run(folders, capsys, monkeypatch):
    finished, failed, stopped, queued, running, missing = folders
    assert len(set(folders)) == 6 and all(folder.parts[:2] == ("swp", "classification") for folder in folders)
    finished.mkdir(parents=True)
    (finished / "result.json").write_text(json.dumps({"metrics": {"test/n": 357, "test/top1": 0.5}}))
    fail(failed, RuntimeError("no memory\nleft"))
    fail(stopped, KeyboardInterrupt())
    assert not (stopped / "failed.json").exists()
    queued.mkdir()
    (queued / "submitted.json").write_text(json.dumps({"job": "12_3"}))
    monkeypatch.setattr("retinue.runs.sweep.list_jobs", lambda: frozenset({"12_3", "13"}))
    with held_by_another_process(running.absolute()):
        sweep_status.main(["-m", *SWEEP])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1][:5] == ["recipe.epochs=1", "seed=0", "finished", "test/top1", "0.5000"]
    assert lines[2][2:7] == ["failed", "RuntimeError:", "no", "memory", "left"]
    assert lines[3][2] == "stopped"
    assert lines[4][:5] == ["recipe.epochs=2", "seed=0", "queued", "job", "12_3"]
    assert lines[5][2:4] == ["running", "on"]
    assert lines[6][2] == "missing" and lines[6][-1] == str(missing)
    assert " ".join(lines[7]) == "1 finished, 1 failed, 1 stopped, 1 queued, 1 running, 1 missing"
    (queued / "failed.json").write_text('{"reason": "x"}')
    assert status(queued, frozenset()).state == "failed"


@pytest.mark.parametrize("text", ['{"metrics": {"test/top1"', "[]", '{"metrics": 3}', ""])
def test_a_damaged_result_is_unreadable(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    state, detail = status(tmp_path)
    assert state == "unreadable" and state in STATES
    assert "result.json cannot be read: " in detail and detail.endswith("remove it and start the same command again")
    with pytest.raises(ValueError, match=r"result\.json cannot be read"):
        read_result(tmp_path)


def test_the_help_is_the_docstring(capsys):
    sweep_status.main(["--help"])
    assert capsys.readouterr().out == f"{sweep_status.__doc__}\n"


def test_a_failure_is_forgotten_when_the_run_is_tried_again(tmp_path):
    fail(tmp_path, ValueError("a reason"))
    assert status(tmp_path).detail == "a reason"
    with attempt(tmp_path):
        assert not (tmp_path / "failed.json").exists()
    assert status(tmp_path).state == "stopped"


def test_only_one_process_at_a_time_holds_a_run(tmp_path):
    with held_by_another_process(tmp_path) as pid:
        with pytest.raises(ValueError, match=f"is being trained by process {pid} on .*; wait for it, or end it"):
            fail(tmp_path, RuntimeError("never reached"))
        assert not (tmp_path / "failed.json").exists()
    with attempt(tmp_path):
        pass
    assert not (tmp_path / "run.lock").exists()
