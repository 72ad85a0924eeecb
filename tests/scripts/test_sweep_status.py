import json
import subprocess
import sys
from contextlib import contextmanager

import pytest

from retinue.runs.status import attempt, status
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
    sweep_status.register_resolvers()
    return [run.folder for run in sweep_status.look(SWEEP)]


@contextmanager
def trained_elsewhere(folder):
    """Another process has its turn at the run."""
    turn = (
        "from pathlib import Path; from retinue.runs.status import attempt\nwith attempt(Path({!r})): print(); input()"
    )
    command = [sys.executable, "-c", turn.format(str(folder))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROJECT) as other:
        assert other.stdout and other.stdout.readline() == "\n"
        yield other.pid
        other.communicate("\n")


def fail(folder, error):
    with pytest.raises(type(error)), attempt(folder):
        (folder / "config.yaml").touch()
        raise error


def test_every_state_of_a_run_is_told_from_its_folder(folders, capsys, monkeypatch):
    finished, failed, stopped, queued, running, missing = folders
    assert len(set(folders)) == 6 and all(folder.parts[:2] == ("swp", "classification") for folder in folders)
    finished.mkdir(parents=True)
    (finished / "result.json").write_text(json.dumps({"metrics": {"test/n": 357, "test/top1": 0.5}}))
    fail(failed, RuntimeError("no memory\nleft"))
    fail(stopped, KeyboardInterrupt())
    assert not (stopped / "failed.json").exists()
    queued.mkdir()
    (queued / "submitted.json").write_text(json.dumps({"job": "12_3"}))
    monkeypatch.setattr(sweep_status, "queue", lambda: frozenset({"12_3", "13"}))
    with trained_elsewhere(running.absolute()):
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


def test_a_failure_is_forgotten_when_the_run_is_tried_again(tmp_path):
    fail(tmp_path, ValueError("of a kind"))
    assert status(tmp_path).detail == "of a kind"
    with attempt(tmp_path):
        assert not (tmp_path / "failed.json").exists()
    assert status(tmp_path).state == "stopped"


def test_a_run_has_one_process_at_a_time(tmp_path):
    with trained_elsewhere(tmp_path) as other:
        with pytest.raises(ValueError, match=f"is being trained by process {other} on .*; wait for it, or end it"):
            fail(tmp_path, RuntimeError("never reached"))
        assert not (tmp_path / "failed.json").exists()
    with attempt(tmp_path):
        pass
    assert not (tmp_path / "run.lock").exists()
