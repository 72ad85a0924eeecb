"""Run `train.py` and `eval.py` as a user does."""

import csv
import logging
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from retinue.runs.result_file import read_result
from retinue.utils.paths import PROJECT

SWIN = ("model=swin", "model.size=nano")
# Seconds instead of minutes: Swin's nano size, a few batches of digits, a few epochs.
SMALL = (
    "data.image_size=16", "recipe.epochs=2", "recipe.batch_size=32", "trainer.limit_train_batches=5",
    "trainer.accelerator=cpu", "logger=none", "data.num_workers=0",
)  # fmt: skip

# Mark of tests that shard nets over processes on CPUs
averages_shards = pytest.mark.skipif(torch.__version__ < "2.11", reason="torch 2.8 sums sharded gradients on CPUs")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error; fails if there is a traceback, a second line or a different exit code."""
        lines = [line for line in self.err.splitlines() if line]
        assert self.code == 2, (self.code, self.err)
        assert lines and lines[-1].startswith("error: "), self.err
        assert not re.search(r"Traceback|^  File ", self.err, re.MULTILINE), self.err
        assert len([line for line in lines if line.startswith("error")]) == 1
        return lines[-1]


def run_here(program: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run `python program.py ...` in this process and its working folder, and return the exit code."""
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *arguments])
    GlobalHydra.instance().clear()
    handlers = logging.root.handlers[:]
    try:
        runpy.run_path(str(PROJECT / f"{program}.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    finally:
        for handler in set(logging.root.handlers) - set(handlers):
            handler.close()
        logging.root.handlers[:] = handlers
    return 0


class CommandLine:
    """Run programs in this process, which is quick, since torch is imported only once."""

    def __init__(self, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, folder: Path):
        self.capfd, self.monkeypatch, self.folder = capfd, monkeypatch, folder
        monkeypatch.chdir(folder)

    def __call__(self, program: str, *arguments: str) -> Outcome:
        self.capfd.readouterr()
        code = run_here(program, *arguments, monkeypatch=self.monkeypatch)
        out, err = self.capfd.readouterr()
        return Outcome(code, out, err)

    def train(self, *arguments: str) -> Outcome:
        net = () if any(argument.startswith("model=") for argument in arguments) else SWIN
        return self("train", *net, *SMALL, *arguments)

    def files(self) -> list[str]:
        """Return the paths of all files below the working folder."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())


def result(folder: Path) -> dict[str, Any]:
    """Return the result of a finished run."""
    finished = read_result(folder)
    assert finished is not None
    return finished


def rows(path: str | Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def start(program: str, *arguments: str, folder: Path, **environment: str) -> subprocess.Popen:
    """Start `python program.py ...` in `folder` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(PROJECT / f"{program}.py"), *arguments],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def stop_when(process: subprocess.Popen, file: Path, number: signal.Signals) -> int:
    """Send a signal as soon as `file` exists, and return the exit code."""
    deadline = time.monotonic() + 120
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[1]
    process.send_signal(number)
    return process.wait(60)
