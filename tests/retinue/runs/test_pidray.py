"""A run on PIDray is evaluated on its three test sets by one command."""

import json

import numpy as np
import pytest

from tests.datamodules.test_pidray import write_pidray
from tests.retinue.runs.cli import result
from tests.retinue.runs.untrained import make_run


def test_one_evaluation_has_the_figures_of_each_set_and_their_means(cli, tmp_path):
    (tmp_path / "pidray").mkdir()
    write_pidray(tmp_path / "pidray")
    make_run(
        tmp_path / "run", "data=pidray", f"data.root={tmp_path}/pidray", "data.test=hidden", "data.image_size=[64,96]",
        "head.size=small", "data.num_workers=0",
    )  # fmt: skip
    outcome = cli("eval", "run=run", "data.test=[easy,hard,hidden]", "trainer=cpu", "hydra.run.dir=evaluation")
    assert outcome.code == 0, outcome.err
    metrics = result(tmp_path / "evaluation")["metrics"]
    assert metrics["test/n"] == 15 and [metrics[f"test/{name}/n"] for name in ("easy", "hard", "hidden")] == [5] * 3
    for kind in ("box", "mask"):
        of_sets = [metrics[f"test/{name}/{kind}_ap"] for name in ("easy", "hard", "hidden")]
        assert metrics[f"test/{kind}_ap"] == pytest.approx(np.mean(of_sets))
    ids = json.loads((tmp_path / "evaluation/detection_ids.json").read_text())
    folders = [image["file_name"].partition("/")[0] for image in ids["images"]]
    assert folders == ["easy"] * 5 + ["hard"] * 5 + ["hidden"] * 5
