"""Train on a small folder like ImageNet, as files and as tar shards."""

import subprocess
import sys

import pytest

from datamodules.shards import make_shards
from retinue.utils.paths import PROJECT
from tests.imagenet_folder import make_imagenet_folder
from tests.retinue.runs.cli import SWIN, result, rows

NET = (*SWIN, "trainer.accelerator=cpu", "data.image_size=32", "data.num_workers=0", "data.broken_limit=0.2")
TRAINING = ("logger=none", "recipe.epochs=2", "recipe.batch_size=8", "recipe.schedule.warmup_epochs=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make three classes of images of several sizes, some grey or CMYK and one truncated."""
    return make_imagenet_folder(tmp_path_factory.mktemp("imagenet") / "images", classes=3, per_class=10, broken=True)


@pytest.fixture(scope="module")
def shards(folder):
    out = folder.with_name("shards")
    command = [sys.executable, str(PROJECT / "scripts/make_shards.py"), f"source={folder}", f"out={out}"]
    subprocess.run(command, check=True, capture_output=True)
    return out


def test_folder_and_shards_give_the_same_run(cli, folder, shards):
    outcomes = {
        data: cli("train", *NET, *TRAINING, f"data={data}", f"data.root={root}", f"hydra.run.dir={data}")
        for data, root in (("imagenet", folder), ("webdataset", shards))
    }
    for outcome in outcomes.values():
        assert outcome.code == 0, outcome.err
        assert "broken image skipped: " in outcome.err
    from_files, from_shards = result(cli.folder / "imagenet"), result(cli.folder / "webdataset")
    assert from_files["metrics"] == from_shards["metrics"]
    assert all(from_files[key] == from_shards[key] for key in ("params", "macs", "steps"))
    losses = [[row["train/loss"] for row in rows(f"{data}/metrics.csv")] for data in outcomes]
    assert losses[0] == losses[1]
    assert any(" " in name or name.islower() for name in from_files["metrics"]["test/per_class"])
    # The classes have names, not wnids.
    assert not any(name.startswith("n0") for name in from_files["metrics"]["test/per_class"])

    weights = "weights=imagenet/checkpoints/best.ckpt"
    evaluated = cli("eval", *NET, "data=webdataset", f"data.root={shards}", weights, "hydra.run.dir=evaluated")
    assert evaluated.code == 0, evaluated.err
    assert result(cli.folder / "evaluated")["metrics"]["test/top1"] == from_files["metrics"]["test/top1"]
    names = [row["image"] for row in rows("evaluated/predictions.csv")]
    assert len(names) == len(set(names)) == from_files["metrics"]["test/n"] and all(name.count("/") for name in names)


def test_a_run_on_resized_images_says_so(cli, folder):
    out = cli.folder / "resized"
    make_shards(folder, out, "imagenet", max_side=40)
    options = ("recipe.augment.auto_augment=rand-m9-mstd0.5", "recipe.augment.scale=[0.3,1.0]")
    quick = ("recipe.augment.device=gpu", "recipe.augment.decode=reduced", "hydra.run.dir=run")
    outcome = cli("train", *NET, *TRAINING, *options, "data=webdataset", f"data.root={out}", *quick)
    assert outcome.code == 0, outcome.err
    assert result(cli.folder / "run")["training_images"] == "resized to at most 40 px when they were packed"


def test_too_many_broken_images_stop_the_run(cli, folder):
    outcome = cli("train", *NET, *TRAINING, "data=imagenet", f"data.root={folder}", "data.broken_limit=0")
    assert "images are broken, more than data.broken_limit=0" in outcome.error
    assert "broken image skipped: " in outcome.err
