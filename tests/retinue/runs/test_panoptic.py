"""Panoptic segmentation from the command line: trained, and evaluated by one and by two processes."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.panoptic_folder import CATEGORIES, NAMES, write_panoptic
from tests.retinue.runs.cli import SWIN, result, rows, start
from tests.retinue.runs.untrained import make_run


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


def test_predictions_are_those_of_an_evaluation(cli, tmp_path):
    """The data are away, and the images' names, and so their ids, are in another order than in the annotations."""
    write_panoptic(tmp_path / "data", {"train": 1, "val": 3})
    make_run(
        tmp_path / "run", "data=coco_panoptic", "recipe=small_panoptic", "data.kind=small",
        f"data.root={tmp_path}/data", "data.image_size=[64,96]", "data.num_workers=0",
        # The scores of random weights are low.
        "+head.args.test_cfg.object_mask_thr=0.0", "+head.args.test_cfg.iou_thr=0.0",
    )  # fmt: skip
    evaluated = cli("eval", "run=run", "save_predictions=true", "trainer=cpu", "hydra.run.dir=evaluated")
    assert evaluated.code == 0, evaluated.err
    (tmp_path / "data").rename(tmp_path / "away")
    predicted = cli("predict", "run=run", "images=away/val2017", "pictures=true", "trainer=cpu", "save=predicted")
    assert predicted.code == 0, predicted.err
    one, two = (json.loads((tmp_path / folder / "panoptic.json").read_text()) for folder in ("evaluated", "predicted"))
    assert [row["name"] for row in two["categories"]] == NAMES and two["categories"] == one["categories"]
    assert [row["isthing"] for row in two["categories"]] == [1, 1, 0, 0]
    assert [row["file_name"] for row in two["images"]] == ["000.png", "001.png", "002.png"]
    segments = [{row["file_name"]: row["segments_info"] for row in content["annotations"]} for content in (one, two)]
    assert segments[0] == segments[1] and any(segments[0].values())
    for name in segments[0]:
        maps = [(tmp_path / folder / "maps" / name).read_bytes() for folder in ("evaluated", "predicted")]
        assert maps[0] == maps[1]
        assert (tmp_path / "predicted/images" / name).is_file()
