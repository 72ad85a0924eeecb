"""Multi-label classification from the command line: training, evaluation, comparison and prediction."""

import numpy as np
import pytest
from PIL import Image

from datamodules.scenes import write_scenes
from retinue.evaluation.contributions import Contributions
from retinue.evaluation.multi_label import FIGURES
from tests.retinue.runs.cli import SMALL, SWIN, result, rows
from tests.retinue.runs.test_config import composed
from tests.retinue.runs.test_ddp import trained
from tests.retinue.runs.test_resume import assert_a_killed_run_ends_the_same

TASK = ("task=multi_label", "model=swin", "model.size=nano", "data.num_workers=0", "logger=none", "trainer=cpu")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, {"train": 16, "val": 5, "test": 7})
    return folder


def test_a_run_is_evaluated_and_predicts_the_images_of_its_test(cli, scenes, tmp_path):
    data = f"data.root={scenes}"
    outcome = cli("train", *TASK, data, "data.image_size=32", "recipe.epochs=1", "recipe.batch_size=4",
                  "recipe.loss=asl", "recipe.augment.mixup=0.5", "hydra.run.dir=run")  # fmt: skip
    assert outcome.code == 0, outcome.err
    [last] = [row for row in rows("run/metrics.csv") if row.get("val/map")]
    metrics = result(tmp_path / "run")["metrics"]
    assert all(float(last[f"val/{name}"]) >= 0 for name in FIGURES)
    assert metrics["test/n"] == 7 and set(metrics["test/per_class"]) == set("0123456789")
    observed = Contributions.read(tmp_path / "run").observed()
    for name in FIGURES:
        assert observed[name] == metrics[f"test/{name}"]

    outcome = cli("eval", "run=run", "data.num_workers=0", "trainer=cpu", "batch_size=3", "save_predictions=true")
    assert outcome.code == 0, outcome.err
    [evaluation] = (tmp_path / "run/evaluation").iterdir()
    assert result(evaluation)["metrics"]["test/map"] == pytest.approx(metrics["test/map"])
    assert {path.name for path in evaluation.iterdir()} >= {"predictions.csv", "classes.csv", "probabilities.csv"}
    truth = rows(evaluation / "predictions.csv")
    assert {row["image"] for row in truth} == {f"{i:05d}.jpg" for i in range(7)} and any(row["labels"] for row in truth)

    outcome = cli("predict", "run=run", f"images={scenes}/images/test", "save=out", "pictures=true", "trainer=cpu")
    assert outcome.code == 0, outcome.err
    predicted = rows("out/probabilities.csv")
    for name in ("image", "prediction"):
        assert [row[name] for row in predicted] == [row[name] for row in truth]
    for one, other in zip(predicted, truth, strict=True):
        assert [float(one[k]) for k in "0123456789"] == pytest.approx([float(other[k]) for k in "0123456789"], abs=1e-5)
    assert len(list((tmp_path / "out/images").iterdir())) == 7


def test_a_run_learns_the_classes_of_a_csv_file(cli, tmp_path):
    rng, rows_of_csv = np.random.default_rng(0), ["image,labels"]
    for i in range(80):
        present = rng.random(3) < 0.5
        pixels = rng.integers(0, 100, (16, 16, 3)) + 120 * present
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{i}.png")
        names = [name for name, is_there in zip(("red", "green", "blue"), present, strict=True) if is_there]
        rows_of_csv.append(f"{i}.png,{'|'.join(names)}")
    (tmp_path / "train.csv").write_text("\n".join(rows_of_csv))
    outcome = cli("train", *TASK, "data=multi_label", f"data.root={tmp_path}", "data.image_size=16", "recipe.epochs=4",
                  "recipe.optimizer.lr=3e-3", "recipe.ema.decay=null", "hydra.run.dir=run")  # fmt: skip
    assert outcome.code == 0, outcome.err
    metrics = result(tmp_path / "run")["metrics"]
    assert metrics["test/n"] == 16 and list(metrics["test/per_class"]) == ["blue", "green", "red"]
    assert metrics["test/map"] > 0.95


def test_what_does_not_fit_is_one_line(cli):
    for override, says in {
        "recipe=small_data": "recipe.loss must be bce or asl, not 'ce'",
        "data=default_classification": "data=digits is for task=classification, not task=multi_label",
        "task.figure=top1": "task.figure must be one of map, f1_micro, f1_macro, not 'top1'",
        "data.sampler=balanced": "data.sampler must be repeat_factor or null, not 'balanced'",
    }.items():
        assert says in cli("train", *TASK, override).error


def test_the_default_recipe_follows_from_the_data():
    assert composed("task=multi_label").recipe.loss == "bce"
    assert composed("data=multi_label").task.name == "multi_label"
    assert composed("data=multi_label", "recipe=multi_label").recipe.loss == "asl"
    assert composed("data=multi_label", "recipe=swin", "recipe.loss=bce").recipe.epochs == 300


@pytest.mark.slow
def test_a_killed_run_ends_the_same(scenes, tmp_path):
    arguments = (
        *SWIN, *SMALL, "task=multi_label", f"data.root={scenes}", "data.image_size=32", "recipe.batch_size=4",
        "recipe.epochs=8",
        "recipe.augment.mixup=0.8", "recipe.loss=asl", "data.sampler=repeat_factor", "data.repeat_threshold=0.9",
        "checkpoint.every_steps=1", "hydra.run.dir=run",
    )  # fmt: skip
    assert_a_killed_run_ends_the_same(arguments, tmp_path)


@pytest.mark.slow
def test_two_processes_equal_one(scenes, tmp_path):
    runs = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        data = ("task=multi_label", f"data.root={scenes}", "data.image_size=32", "recipe.batch_size=4")
        runs.append(trained(folder, *data, f"trainer.devices={devices}", "trainer.strategy=ddp"))
    (single, one), (shared, two) = runs
    for key, value in single["state_dict"].items():
        if value.is_floating_point():
            assert (value - shared["state_dict"][key]).norm() / value.norm().clamp_min(1e-3) < 1e-4, key
    for name in FIGURES:
        assert one["metrics"][f"test/{name}"] == pytest.approx(two["metrics"][f"test/{name}"], rel=1e-3)
