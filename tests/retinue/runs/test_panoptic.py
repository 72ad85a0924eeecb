"""Panoptic segmentation from the command line: trained, and evaluated by one and by two processes."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.panoptic_folder import CATEGORIES, NAMES, write_panoptic
from tests.retinue.runs.cli import SWIN, result, rows, start


def train(cli):
    outcome = cli(
        "train", *SWIN, "data=coco_panoptic", "data.kind=small", "data.root=data", "data.image_size=[64,96]",
        "data.num_workers=0", "logger=none", "trainer=cpu", "recipe.epochs=1", "recipe.batch_size=2",
        "recipe.optimizer.lr_batch_size=2", "hydra.run.dir=run",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err


@pytest.mark.slow
def test_a_panoptic_run_and_its_results(cli, tmp_path):
    """A tool of COCO's finds a segment for each id of each predicted map, with a category of the data."""
    write_panoptic(tmp_path / "data", {"train": 6, "val": 3})
    train(cli)
    trained = result(tmp_path / "run")
    assert (trained["task"], trained["head"], trained["metrics"]["test/n"]) == ("panoptic", "mask2former_panoptic", 3)
    assert 0 <= trained["metrics"]["test/pq"] <= 1 and list(trained["metrics"]["test/per_class"]) == NAMES
    logged = rows(tmp_path / "run/metrics.csv")[-1]
    assert all(float(logged[f"train/{name}"]) > 0 for name in ("loss_cls", "loss_mask", "loss_dice"))
    assert logged["val/pq"] != ""
    outcome = cli(
        "eval", "run=run", "trainer=cpu", "batch_size=2", "save_maps=true", "save_images=2", "hydra.run.dir=evaluation"
    )
    assert outcome.code == 0, outcome.err
    assert result(tmp_path / "evaluation")["metrics"] == trained["metrics"]
    outcome = cli("predict", "run=run", "images=data", "trainer=cpu")
    assert (
        "predict.py is for classification, multi_label, hashing, detection, segmentation, not task=panoptic"
        in outcome.error
    )
    assert len([*(tmp_path / "evaluation/images").glob("*.png")]) == 2 and (tmp_path / "evaluation/pq.csv").is_file()
    annotations = json.loads((tmp_path / "evaluation/panoptic.json").read_text())["annotations"]
    truth = json.loads((tmp_path / "data/annotations/panoptic_val2017.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"], 3) for image in truth["images"]}
    assert sorted(row["image_id"] for row in annotations) == sorted(sizes)
    for row in annotations:
        values = np.asarray(Image.open(tmp_path / "evaluation/maps" / row["file_name"])).astype(int)
        assert values.shape == sizes[row["image_id"]]
        ids = set(np.unique(values @ [1, 256, 65536]).tolist()) - {0}
        assert ids == {segment["id"] for segment in row["segments_info"]}
        assert {s["category_id"] for s in row["segments_info"]} <= {category["id"] for category in CATEGORIES}


@pytest.mark.slow
def test_two_processes_equal_one(cli, tmp_path):
    write_panoptic(tmp_path / "data", {"train": 6, "val": 5})
    train(cli)
    # Images of several sizes in one batch are padded, so the batches must be the same.
    common = ("run=run", "trainer=cpu", "batch_size=1", "save_maps=true")
    assert cli("eval", *common, "hydra.run.dir=one").code == 0
    evaluation = start(
        "eval", *common, "trainer.devices=2", "trainer.strategy=ddp", "hydra.run.dir=two", folder=tmp_path
    )
    _, err = evaluation.communicate(timeout=400)
    assert evaluation.returncode == 0, err
    one, two = (result(tmp_path / folder)["metrics"] for folder in ("one", "two"))
    assert two == one
    files = [(tmp_path / folder / "panoptic.json").read_text() for folder in ("one", "two")]
    assert files[0] == files[1] and len(json.loads(files[0])["annotations"]) == 5
