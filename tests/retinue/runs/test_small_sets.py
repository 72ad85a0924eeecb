"""Small training sets get enough steps, and batch norm's statistics are those of the weights that are evaluated."""

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from models import load_weights
from retinue.runs.batch_norm import batch_norms
from retinue.runs.checkpoints import Checkpoints
from retinue.runs.identity import fingerprint, run_folder
from retinue.runs.small_sets import fit_batch
from retinue.runs.training import build_data, build_task
from tests.retinue.runs.cli import SWIN, result, rows, start
from tests.retinue.runs.test_config import composed
from tests.retinue.runs.test_resume import assert_same_run

QUICK = ("trainer=cpu", "logger=none", "data.num_workers=0")


def stripes(rng: np.random.Generator, label: int, size: int) -> np.ndarray:
    """Return an image of wide or narrow, level or upright stripes: four classes."""
    wave = np.sin((np.arange(size) + rng.uniform(0, 16)) * (0.4, 1.2)[label // 2])[:, None].repeat(size, 1)
    wave = wave.T if label % 2 else wave
    return (
        (rng.uniform(90, 160, 3) + 60 * wave[..., None] + rng.normal(0, 10, (size, size, 3))).clip(0, 255).astype("u1")
    )


@pytest.fixture(scope="module")
def textures(tmp_path_factory):
    """Write folders of training images (`classes40`, `masks40`, ...) and return a function from a name to its path."""
    parent = tmp_path_factory.mktemp("textures")

    def path(kind: str, count: int):
        folder = parent / f"{kind}{count}"
        if folder.exists():
            return folder
        rng = np.random.default_rng(0)
        for split, images in (("train", count), ("val", 24)):
            for i in range(images):
                if kind == "classes":
                    (folder / split / str(i % 4)).mkdir(parents=True, exist_ok=True)
                    Image.fromarray(stripes(rng, i % 4, 32)).save(folder / split / str(i % 4) / f"{i}.png")
                    continue
                left, right = rng.permutation(4)[:2]
                image, mask = stripes(rng, left, 64), np.full((64, 64), left, "u1")
                image[:, 32:], mask[:, 32:] = stripes(rng, right, 64)[:, 32:], right
                for name, pixels in (("images", image), ("masks", mask)):
                    (folder / name / split).mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(folder / name / split / f"{i}.png")
        return folder

    return path


@pytest.mark.parametrize(
    ("images", "batch_size"), [(1255, 64), (512, 64), (511, 32), (100, 8), (64, 8), (40, 4), (17, 2), (9, 2), (3, 2)]
)
def test_a_batch_is_at_most_an_eighth_of_a_small_training_set(images, batch_size):
    cfg = composed()
    chosen = run_folder(cfg), fingerprint(cfg)
    fit_batch(cfg, images)
    assert cfg.recipe.batch_size == batch_size
    assert cfg.recipe.reduced_from == (None if batch_size == 64 else 64)
    assert (run_folder(cfg), fingerprint(cfg)) == chosen
    fit_batch(cfg, images)
    assert cfg.recipe.batch_size == batch_size


@pytest.mark.parametrize(
    ("overrides", "batch_size"),
    [
        (["recipe.batch_size=32"], 32),
        (["recipe=deit"], 1024),
        (["trainer.devices=3"], 6),
        (["trainer.accumulate_grad_batches=8"], 8),
        (["task=detection"], 4),
        (["task=segmentation"], 4),
    ],
)
def test_a_batch_size_of_the_users_or_of_a_larger_recipe_stays(overrides, batch_size):
    cfg = composed(*overrides)
    fit_batch(cfg, 40)
    assert cfg.recipe.batch_size == batch_size


def test_a_run_on_a_small_set_says_which_batch_size_it_takes(cli, textures):
    run = ("train", *SWIN, *QUICK, "data=image_folder", f"data.root={textures('classes', 40)}", "data.image_size=32",
           "recipe.epochs=2", "hydra.run.dir=run")  # fmt: skip
    outcome = cli(*run)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("recipe.batch_size is 4 instead of 64") == 1
    recipe = OmegaConf.load("run/config.yaml").recipe
    assert (recipe.batch_size, recipe.reduced_from) == (4, 64)
    assert result(cli.folder / "run")["steps"] == 20
    last = rows("run/metrics.csv")[-1]
    assert float(last["train/lr"]) < 1e-3 * 4 / 64
    again = cli(*run)
    assert again.code == 0 and "epoch" not in again.err, again.err
    assert "holds a run with recipe.batch_size=64, not 8" in cli(*run, "recipe.batch_size=8").error


def test_a_warm_up_of_most_of_the_run_is_warned_of_once(cli):
    outcome = cli.train("recipe.epochs=2", "hydra.run.dir=run")
    assert outcome.err.count("the warm-up takes 10 of the run's 10 steps") == 1
    assert "recipe.schedule.warmup_epochs=0.2 is a tenth" in outcome.err
    shorter = cli.train("recipe.epochs=2", "recipe.schedule.warmup_epochs=0.2", "hydra.run.dir=shorter")
    assert shorter.code == 0 and "warm-up" not in shorter.err, shorter.err


def batch_norm_run(textures, task: str) -> tuple[str, ...]:
    """Return the command of a run of few steps whose net has batch norm."""
    common = (
        *QUICK, "model=timm", "model.name=resnet10t", "recipe.epochs=2", "checkpoint.every_steps=3",
        "hydra.run.dir=run",
    )  # fmt: skip
    if task == "classification":
        return (
            *common, "data=image_folder", f"data.root={textures('classes', 40)}", "data.image_size=32",
            "recipe.batch_size=8", "recipe.optimizer.lr=2e-2", "recipe.schedule.warmup_epochs=0",
        )  # fmt: skip
    return (
        *common, "data=mask_folder", f"data.root={textures('masks', 24)}", "data.classes=4", "data.image_size=[64,64]",
        "recipe.batch_size=4", "recipe.optimizer.lr=1e-2", "recipe.schedule.warmup_epochs=0.2",
    )  # fmt: skip


FIGURES = {"classification": "top1", "segmentation": "pixel_accuracy"}


def accuracy(run, batch_statistics: bool) -> float:
    """Return the share of labels or pixels of the validation split that a run's best net predicts.

    Args:
        run: the run's folder.
        batch_statistics: whether batch norm takes the statistics of the images instead of its own.
    """
    cfg = OmegaConf.load(run / "config.yaml")
    assert isinstance(cfg, DictConfig)
    datamodule = build_data(cfg)
    task = build_task(cfg, datamodule)
    load_weights(task.model, run / "checkpoints/best.ckpt")
    task.model.eval()
    for layer in batch_norms(task.model):
        layer.train(batch_statistics)
    datamodule.batch_size = 24
    [batch] = [datamodule.on_after_batch_transfer(batch, 0) for batch in datamodule.val_dataloader()]
    with torch.no_grad():
        if cfg.task.name == "classification":
            return float((task(batch["image"]).argmax(1) == batch["label"]).float().mean())
        predicted = task.model.logits(torch.stack(batch["image"])).argmax(1)
        return float((predicted == torch.stack(batch["mask"])).float().mean())


@pytest.mark.parametrize("task", FIGURES)
def test_a_short_run_is_scored_with_statistics_of_its_weights_and_resumes_bit_for_bit(task, cli, textures, monkeypatch):
    command = batch_norm_run(textures, task)
    outcome = cli("train", *command, "hydra.run.dir=whole")
    assert outcome.code == 0, outcome.err
    whole = cli.folder / "whole"
    images = {"classification": 40, "segmentation": 24}[task]
    assert result(whole)["batch_norm"] == f"re-estimated from {images} images"
    assert outcome.err.count(f"they are re-estimated from {images} training images before each validation") == 1

    scored = max(float(row[f"val/{FIGURES[task]}"]) for row in rows(whole / "metrics.csv"))
    own, of_the_batch = (accuracy(whole, batch_statistics) for batch_statistics in (False, True))
    assert own == pytest.approx(scored, abs=1e-6)
    assert own > 0.5 and own == pytest.approx(of_the_batch, abs=0.1)
    # The running averages of this segmentor give 0.80, batch statistics 0.89.
    assert task == "classification" or own > of_the_batch - 0.05

    save, saved = Checkpoints.save, []

    def save_and_die(self, *arguments):
        save(self, *arguments)
        saved.append(self)
        if len(saved) == 3:
            raise RuntimeError("killed")

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(RuntimeError, match="killed"):
        cli("train", *command)
    monkeypatch.setattr(Checkpoints, "save", save)
    again = cli("train", *command)
    assert again.code == 0 and "going on from" in again.err, again.err
    assert_same_run(whole, cli.folder / "run")
    assert result(cli.folder / "run")["batch_norm"] == result(whole)["batch_norm"]


@pytest.mark.slow
def test_two_processes_share_the_statistics(textures, tmp_path):
    command = (
        *batch_norm_run(textures, "classification"),
        "recipe.epochs=1",
        "trainer.devices=2",
        "trainer.strategy=ddp",
    )
    run = start("train", *command, folder=tmp_path)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    finished = result(tmp_path / "run")
    assert finished["batch_norm"] == "re-estimated from 40 images"
    # The test loads the statistics of rank 0. Without a test split it has the validation's images.
    validated = float(rows(tmp_path / "run/metrics.csv")[-1]["val/loss"])
    assert finished["metrics"]["test/loss"] == pytest.approx(validated, rel=1e-5)
