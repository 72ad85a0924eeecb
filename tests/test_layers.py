"""Imports go one way: a module imports its own layer and those below it, never one above."""

import ast
from pathlib import Path

import pytest

from retinue.utils.paths import PROJECT

# From the bottom to the top. A folder's modules belong to its longest prefix in this list.
LAYERS = (
    "retinue.utils",
    "ops",
    "models",
    "datamodules",
    "retinue.evaluation",
    "retinue.probing",
    "retinue.tasks",
    "retinue.runs",
    "retinue.benchmarks",
    "retinue.results",
    "scripts",
)
COMMANDS = ("train", "eval", "predict", "probe", "retinue.__main__", "hydra_plugins.retinue_launcher")


def rank(module: str) -> int | None:
    """Return the height of a module's layer; None for a library, and for `retinue` itself, which imports nothing."""
    if any(module == name or module.startswith(f"{name}.") for name in COMMANDS):
        return len(LAYERS)
    return next((i for i, name in enumerate(LAYERS) if module == name or module.startswith(f"{name}.")), None)


def imported_modules(source: str) -> set[str]:
    """Return every module that a file imports, also within functions; of `from a import b`, both a and a.b."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def upward_imports(module: str, source: str) -> list[str]:
    """Return the imported modules whose layer is above that of `module`."""
    own = rank(module)
    assert own is not None, f"{module} belongs to no layer"
    return sorted(name for name in imported_modules(source) if (height := rank(name)) is not None and height > own)


def module_files() -> list[tuple[str, Path]]:
    files = []
    for path in sorted(PROJECT.rglob("*.py")):
        parts = path.relative_to(PROJECT).with_suffix("").parts
        if parts[0].startswith(".") or parts[0] in ("tests", "outputs", "build") or parts == ("retinue", "__init__"):
            continue
        files.append((".".join(parts).removesuffix(".__init__"), path))
    return files


@pytest.mark.parametrize(("module", "path"), [pytest.param(*each, id=each[0]) for each in module_files()])
def test_a_module_imports_nothing_from_a_layer_above(module: str, path: Path):
    assert upward_imports(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops.attention.window", "from retinue.runs.config import identity"),
        ("models.dense", "def f():\n    import datamodules.batch"),
        ("datamodules.base", "from retinue import evaluation"),
        ("retinue.utils.files", "from ops import create_op"),
        ("retinue.results.collection", "from scripts.collect import main"),
    ],
)
def test_an_upward_import_is_found(module: str, source: str):
    assert upward_imports(module, source)
    assert not upward_imports("scripts.collect", source) or module == "retinue.results.collection"


def test_utils_do_not_need_torch():
    for module, path in module_files():
        if module.startswith("retinue.utils"):
            assert not {"torch", "timm", "pytorch_lightning"} & imported_modules(path.read_text(encoding="utf-8"))
