import pytest

from tests.retinue.runs.cli import CommandLine


@pytest.fixture
def cli(capfd, monkeypatch, tmp_path) -> CommandLine:
    return CommandLine(capfd, monkeypatch, tmp_path)
