"""Running kernels on CPU tensors, in a separate process that uses Triton's interpreter."""

import os
import subprocess
import sys

import pytest


def run_interpreted(config: pytest.Config, file: str) -> None:
    """Check that the tests of `file` that are marked `interpreted` pass, in a process with Triton's interpreter.

    Args:
        config: configuration of this pytest run; its `-m` expression decides whether slow tests are included.
        file: path of the test file.
    """
    command = [sys.executable, "-m", "pytest", file, "-p", "no:xdist", "-p", "no:cacheprovider", "-x", "-rA"]
    command += ["-m", config.getoption("markexpr")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(
        command, env=environment, cwd=config.rootpath, capture_output=True, text=True, timeout=900
    )
    assert completed.returncode == 0, completed.stdout[-6000:] + completed.stderr[-2000:]
    assert " passed" in completed.stdout
