"""Without OpenMMLab's packages, classification works, and the heads that need the packages say what to install."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from retinue.utils import openmmlab_packages
from retinue.utils.paths import PROJECT
from tests.retinue.runs.cli import SMALL, SWIN

# Names on the package index of two of the modules.
DISTRIBUTIONS = {"mmcv": "mmcv-lite", "mmseg": "mmsegmentation"}
# Hides the modules from the rest of a program.
HIDE = f"import sys; sys.modules.update(dict.fromkeys({openmmlab_packages.MODULES}))"
RUN = "from retinue.__main__ import list_commands, main; main()"
IMPORT_COMMANDS = "import importlib, retinue.runs.evaluation; [*map(importlib.import_module, list_commands().values())]"


def run_without_openmmlab(folder: Path, program: tuple[str, ...], *arguments: str) -> None:
    command = [sys.executable, "-c", "\n".join([HIDE, *program]), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_classification_trains_and_every_command_is_imported(tmp_path: Path):
    small = (*SMALL, "recipe.epochs=1", "trainer.limit_train_batches=2", "hydra.run.dir=run")
    run_without_openmmlab(tmp_path, (RUN, IMPORT_COMMANDS), "train", *SWIN, *small)
    assert (tmp_path / "run/result.json").is_file()


def test_help_is_shown(tmp_path: Path):
    run_without_openmmlab(tmp_path, (RUN,), "train", "--help", "head=mask_rcnn")


@pytest.mark.parametrize(("task", "head"), [("detection", "retinanet"), ("segmentation", "semantic_fpn")])
def test_a_head_says_what_to_install(task: str, head: str, cli, monkeypatch):
    monkeypatch.setattr(openmmlab_packages, "find_spec", lambda name: None if name == "mmdet" else object())
    choices = f"task={task}", f"head={head}"
    expected = f"{' '.join(choices)} needs the OpenMMLab packages: pip install 'retinue[dense]' (not installed: mmdet)"
    assert cli("train", *choices).error == f"error: {expected}"
    assert cli("eval", *choices, "weights=w.pth").error == f"error: {expected}"
    assert not cli.files()


def test_pyproject_keeps_the_packages_in_the_extra():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base, dense = project["dependencies"], project["optional-dependencies"]["dense"]
    for module in openmmlab_packages.MODULES:
        name = DISTRIBUTIONS.get(module, module)
        assert any(line.startswith(f"{name}>=") for line in dense), name
        assert not any(line.startswith(name) for line in base), name
