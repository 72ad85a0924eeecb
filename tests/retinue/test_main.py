"""The `retinue` command, run as a user runs it: in a folder of the user's own."""

import os
import subprocess
import sys

import pytest

from retinue.__main__ import list_commands, summary
from retinue.utils.paths import PROJECT


@pytest.fixture
def retinue(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "retinue", *arguments]
        environment = os.environ | {"PYTHONPATH": str(PROJECT)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_every_command_with_its_summary(retinue, arguments):
    process = retinue(*arguments)
    assert (process.returncode, process.stderr) == (0, "")
    programs = {"train", "eval", "predict", "probe"}
    names = {path.stem for path in (PROJECT / "scripts").glob("*.py")} - {"__init__"} | programs
    lines = process.stdout.splitlines()[2:]
    assert {line.split()[0] for line in lines} == names
    assert all(len(line.split()) > 1 for line in lines)


def test_a_command_has_its_own_help(retinue):
    process = retinue("collect", "--help")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.startswith(summary("scripts.collect"))
    assert "folder=PATH" in process.stdout
    assert "python train.py" in retinue("train", "--help").stdout


def test_a_command_gets_its_arguments(retinue):
    process = retinue("collect", "folder=nowhere")
    assert (process.returncode, process.stdout, process.stderr) == (2, "", "error: there is no folder nowhere\n")


def test_a_wrong_name_is_answered_with_the_nearest(retinue):
    process = retinue("colect", "folder=outputs")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("error: there is no command 'colect'. Did you mean 'collect'? There are: train, ")
    assert len(process.stderr.splitlines()) == 1


def test_every_command_can_be_imported_as_a_module():
    commands = list_commands()
    assert commands["train"] == "train" and commands["reproduce"] == "scripts.reproduce"
    assert all(summary(module).endswith(".") for module in commands.values())
