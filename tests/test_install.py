"""The wheel holds all that the commands need: code, config, the papers' facts and the report's page."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from retinue import __version__
from retinue.utils.paths import PROJECT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder into which the project's wheel, and nothing else, is installed."""
    source, wheels, site = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if not name.startswith("tests/") and (PROJECT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PROJECT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source], check=True)
    [wheel] = wheels.glob("*.whl")
    assert __version__ in wheel.name
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    return site


def run(site: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_packages_import_from_an_empty_folder(site: Path, tmp_path: Path):
    code = "import retinue, models, ops; print(retinue.__version__, models.__file__)"
    done = run(site, tmp_path, "-c", code)
    assert done.stdout.split() == [__version__, str(site / "models/__init__.py")], done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--help",), "reproduce"),
        (("train", "--help"), "model=swin"),
        (("collect", "--help"), "folder"),
        (("train", "--cfg", "job", "model=swin"), "swin_nano"),
    ],
)
def test_the_command_works_outside_the_clone(site: Path, tmp_path: Path, arguments: tuple[str, ...], expected: str):
    done = run(site, tmp_path, str(site / "bin/retinue"), *arguments)
    assert done.returncode == 0 and expected in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_wrong_value_is_one_line_outside_the_clone(site: Path, tmp_path: Path):
    done = run(site, tmp_path, str(site / "bin/retinue"), "train", "model=swim")
    assert done.returncode == 2 and "Did you mean 'swin'" in done.stderr and "Traceback" not in done.stderr
