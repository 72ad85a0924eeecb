"""Fifty kills at random moments leave the same weights, one row a step, and no process (slow: some 20 minutes)."""

import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from retinue.runs.result_file import read_result
from tests.retinue.runs.cli import SMALL, SWIN, rows, start
from tests.retinue.runs.test_faults import alive, start_group, wait_until
from tests.retinue.runs.test_resume import assert_same_run

KILLS = 25
RUN = (
    *SWIN, *SMALL, "recipe.epochs=40", "data.num_workers=2", "recipe.augment.mixup=0.8", "checkpoint.every_steps=1",
    "trainer.log_every_n_steps=1", "hydra.run.dir=run",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run = start("train", *RUN, folder=folder)
    _, err = run.communicate(timeout=900)
    assert run.returncode == 0, err
    return folder / "run"


def has_ended(process: subprocess.Popen, run: Path, seconds: float) -> bool:
    """Wait until the run has begun and `seconds` have passed, and tell whether its process has ended before."""
    assert wait_until(lambda: (run / "run.lock").exists() or process.poll() is not None, 120)
    return wait_until(lambda: process.poll() is not None, seconds)


def assert_no_process(group: int) -> None:
    """Check that all processes of a group end within five seconds."""
    assert wait_until(lambda: not alive(group), 5), "a process is left"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_kills_at_random_moments_leave_the_same_run(number, undisturbed, tmp_path):
    rng = random.Random(number)
    run, kills = tmp_path / "run", 0
    while kills < KILLS:
        if read_result(run) is not None:
            # The run has finished early: the rest of the kills hit the same run from its start.
            assert_same_run(undisturbed, run)
            shutil.rmtree(run)
        process = start_group(*RUN, folder=tmp_path)
        # A quarter of the moments lie in the start, the others in the training.
        delay = rng.uniform(0, 12) if rng.random() < 0.75 else 0
        if has_ended(process, run, delay):
            continue
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=120)
        kills += 1
        assert_no_process(process.pid)
        assert "Traceback" not in err and not (run / "failed.json").exists(), err
        if number == signal.SIGTERM:
            # Python has no handler yet while it starts.
            assert process.returncode in (0, 128 + number, -number), err
    process = start_group(*RUN, folder=tmp_path)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert_same_run(undisturbed, run)
    steps = [row["step"] for row in rows(run / "metrics.csv")]
    assert len(steps) == len(set(steps)) == len(rows(undisturbed / "metrics.csv"))
    assert_no_process(process.pid)
