"""Selection of the tests that are marked `interpreted`: they run in Triton's interpreter, all others without it.

The interpreter must be chosen by an environment variable before any kernel is imported. So in an ordinary run, one test
per file (`interpreter.run_interpreted`) runs the file's marked tests in a process of its own. To see them one by one:

    TRITON_INTERPRET=1 python -m pytest tests/ops/kernels
"""

from pathlib import Path

import pytest

from ops.backend import interpreted


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: runs in Triton's interpreter only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect this folder's tests that do not fit the mode in which Triton runs."""
    folder = Path(__file__).parent
    deselected = [
        item
        for item in items
        if folder in item.path.parents and (item.get_closest_marker("interpreted") is not None) != interpreted()
    ]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]
