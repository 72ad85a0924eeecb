"""Kernels on CPU tensors: a process of its own for Triton's interpreter."""

import os
import subprocess
import sys

import pytest


def run_interpreted(config: pytest.Config, file: str) -> None:
    """Run the tests of `file` that are marked `interpreted`, slow ones where this run includes them."""
    command = [sys.executable, "-m", "pytest", file, "-p", "no:xdist", "-p", "no:cacheprovider", "-x", "-rA"]
    command += ["-m", config.getoption("markexpr")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=config.rootpath, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
