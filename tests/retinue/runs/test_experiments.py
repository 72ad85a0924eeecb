"""The experiments in conf/experiment follow from papers/: `python scripts/papers.py` writes them."""

import pytest

from retinue.results.papers import DENSE, dense_experiments, experiments, list_papers, model_choice
from retinue.runs.help import list_choices
from retinue.utils.paths import CONF, PROJECT
from scripts import papers
from tests.retinue.runs.test_config import composed

DETECTORS = {name: row for paper in list_papers() for name, row in dense_experiments(paper).items()}
ROWS = {name: row for paper in list_papers() for name, row in experiments(paper).items()}


def test_the_overview_and_the_experiments_are_up_to_date():
    files = {path.relative_to(PROJECT).as_posix(): text for path, text in papers.files().items()}
    stale = [
        name for name, text in files.items() if not (PROJECT / name).is_file() or (PROJECT / name).read_text() != text
    ]
    assert not stale, "run python scripts/papers.py"


@pytest.mark.parametrize("name", ROWS)
def test_an_experiment_is_its_row_on_imagenet(name):
    row = ROWS[name]
    choices = (*model_choice(row["net"], row.get("args", {}), row["input"]), "data=imagenet", *row.get("train", []))
    assert composed(f"experiment={name}") == composed(*choices)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detectors_experiment_is_its_row(name):
    table, row = DETECTORS[name]
    cfg = composed(f"experiment={name}")
    assert cfg == composed(*model_choice(row["net"], row.get("args", {}), None), *row["train"], f"data={DENSE[table]}")
    assert cfg.head.task == cfg.task.name == table
    opening = (CONF / f"experiment/{name}.yaml").read_text().partition("\ndefaults:")[0]
    assert f"\n# {row.get('detector') or row['head']} with" in opening


def test_biformers_and_swins_detectors_and_segmentors_have_experiments():
    heads = ("mask_rcnn_1x", "retinanet_1x", "semantic_fpn_80k", "upernet_160k")
    expected = {f"biformer/{size}_{head}" for size in ("small", "base") for head in heads}
    expected |= {
        f"swin/{size}_{head}" for size in ("tiny", "small") for head in ("mask_rcnn_3x", "cascade_mask_rcnn_3x")
    }
    assert expected | {"swin/tiny_upernet_160k", "swin/base_cascade_mask_rcnn_3x"} <= set(DETECTORS)


def test_rows_that_training_from_scratch_cannot_reproduce_are_no_experiments():
    names = experiments("cswin")
    assert {"cswin/tiny_in1k", "cswin/small_in1k", "cswin/base_in1k"} <= set(names)
    # cswin_large starts from ImageNet-22K, uniformer_large_ls is trained with token labelling.
    assert all(row["net"] != "cswin_large" for row in names.values())
    assert "uniformer_large_ls" not in {row["net"] for row in experiments("uniformer").values()}


def test_every_experiment_is_in_the_help_and_opens_with_its_row():
    assert set(ROWS) <= set(list_choices("experiment"))
    opening = (CONF / "experiment/biformer/tiny_in1k.yaml").read_text().partition("\ndefaults:")[0]
    assert opening.startswith("# @package _global_\n")
    assert "\n# BiFormer-T on ImageNet-1k at 224 px: 13.1 M parameters, 2.2 GFLOPs, top-1 81.4 %" in opening
