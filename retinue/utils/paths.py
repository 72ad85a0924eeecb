"""Folders of the project, in a checkout and in an installed wheel alike."""

from functools import cache
from importlib.metadata import distribution
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
CONF = PROJECT / "conf"
PAPERS = PROJECT / "papers"


@cache
def own_packages() -> frozenset[str]:
    """Return the names of the packages and modules that the project installs, such as `models` and `train`.

    They are those that setuptools found when the project was installed; pyproject.toml holds the rule.
    """
    return frozenset((distribution("retinue").read_text("top_level.txt") or "").split())


def is_own_file(path: Path) -> bool:
    """Tell whether a Python file belongs to the project rather than to a library."""
    if not path.is_relative_to(PROJECT):
        return False
    top = path.relative_to(PROJECT).parts[0]
    return top.removesuffix(".py") in own_packages()


def list_group(group: str, conf: Path = CONF) -> list[str]:
    """Return the names that the config group takes, sorted; for experiments `<paper>/<row>`."""
    folder = conf / group
    names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    # The defaults of the tasks are further names of other choices.
    return [name for name in names if not name.startswith("default_")]
