"""Tests marked `interpreted` run in Triton's interpreter, which must be chosen before any kernel is imported.

An ordinary run therefore runs them in a process of its own, from `interpreter.run_interpreted` in each file. To see
them one by one: TRITON_INTERPRET=1 python -m pytest tests/ops/kernels
"""

from pathlib import Path

import pytest

from ops.backend import interpreted


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: runs in Triton's interpreter only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    left_out = [
        item
        for item in items
        if here in item.path.parents and (item.get_closest_marker("interpreted") is not None) != interpreted()
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
