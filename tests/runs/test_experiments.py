"""conf/experiment and docs/papers.md follow from conf/paper: `python scripts/papers.py` writes them."""

import re

import pytest

from evaluation.tables import CONF, experiments, list_papers, model_choice
from runs.errors import PROJECT
from runs.help import groups
from scripts import papers
from tests.runs.test_config import composed

ROWS = {name: row for paper in list_papers() for name, row in experiments(paper).items()}


def test_the_overview_and_the_experiments_are_up_to_date():
    files = {path.relative_to(PROJECT).as_posix(): text for path, text in papers.files().items()}
    there = {name: (PROJECT / name).read_text() if (PROJECT / name).is_file() else "" for name in files}
    stale = [name for name in files if there[name] != files[name]]
    assert not stale, "run python scripts/papers.py"


@pytest.mark.parametrize("name", ROWS)
def test_an_experiment_is_its_row_on_imagenet(name):  # tests/models/test_papers.py builds the nets
    row = ROWS[name]
    choices = (*model_choice(row["net"], row.get("args", {}), row["input"]), "data=imagenet", *row.get("train", []))
    assert composed(f"experiment={name}") == composed(*choices)


def test_rows_that_no_training_from_scratch_reproduces_are_no_experiments():
    names = experiments("cswin")
    assert {"cswin/tiny_in1k", "cswin/small_in1k", "cswin/base_in1k"} <= set(names)
    assert all(row["net"] != "cswin_large" for row in names.values())  # from ImageNet-22K
    assert "uniformer_large_ls" not in {row["net"] for row in experiments("uniformer").values()}  # token labelling


def test_every_experiment_is_in_the_help_and_opens_with_its_row():
    shown = " ".join(groups()["experiment"])
    for name in ROWS:
        paper, _, row = name.partition("/")
        assert re.search(rf"\b{paper}/{{[^}}]*\b{row}\b", shown), name
    lines = (CONF / "experiment/biformer/tiny_in1k.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# BiFormer-T on ImageNet-1k at 224 px: 13.1 M parameters, 2.2 GFLOPs, top-1 81.4 %")
