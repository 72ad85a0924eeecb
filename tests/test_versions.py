"""The sets of versions lie in the window that pyproject.toml admits."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from retinue.utils.paths import PROJECT

project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-newest.txt"])
def test_a_set_pins_every_requirement_within_its_window(file: str):
    lines = [line for line in (PROJECT / file).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    extras = project["optional-dependencies"]
    for requirement in map(
        Requirement, [*project["dependencies"], *extras["dense"], *extras["parquet"], *extras["dev"]]
    ):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_newest_set_has_the_newest_torch_that_is_admitted():
    [torch] = [Requirement(line) for line in project["dependencies"] if line.startswith("torch>")]
    newest = re.search(r"^torch==2\.(\d+)\.", (PROJECT / "constraints-newest.txt").read_text(encoding="utf-8"), re.M)
    assert newest is not None and f"2.{int(newest[1]) + 1}" not in torch.specifier


def test_the_makefile_takes_the_pythons_that_the_project_admits():
    check = re.search(r"\((\d), (\d+)\) <= .* < \((\d), (\d+)\)", (PROJECT / "Makefile").read_text(encoding="utf-8"))
    assert check is not None
    assert SpecifierSet(project["requires-python"]) == SpecifierSet(f">={check[1]}.{check[2]},<{check[3]}.{check[4]}")
