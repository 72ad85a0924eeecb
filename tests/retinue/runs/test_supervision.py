"""Runs with each augmentation and supervision: from the command line, refused in one line, killed and resumed."""

import os
from pathlib import Path

import pytest
import timm
import torch

from datamodules.digits import Digits
from tests.retinue.runs.cli import SMALL, result, rows
from tests.retinue.runs.test_resume import assert_a_killed_run_ends_the_same

TINY = ("model.size=nano", "+model.args.depths=[2]")
CUTMIX = ("recipe.augment.cutmix=1", "recipe.augment.label_smoothing=0.1")
RUNS = {
    "mixpro": ("model=deit", *TINY, *CUTMIX, "recipe.augment.maskmix={cell: 4}", "task.mixed_labels=mixpro"),
    "transmix": ("model=deit", *TINY, *CUTMIX, "recipe.augment.mixup=0.8", "task.mixed_labels=transmix"),
    "label_maps": ("model=lvvit", *TINY, *CUTMIX, "task.token_labels.source=maps"),
    "teacher": (
        "model=lvvit", *TINY, *CUTMIX, "task.token_labels.source=teacher", "task.distillation.teacher=resnet10t",
        "task.distillation.weights=teacher.pth", "task.distillation.alpha=0",
    ),
    "augmix": ("model=deit", *TINY, "recipe.augment.auto_augment=augmix-m3-w3", "recipe.augment.jsd=12"),
    "diversity": ("model=deit", *TINY, "model.mixers={name: full, diversity: 1.0}", "+task.loss_weights.diversity=0.5"),
    "dcal": ("model=dcal", *TINY, *CUTMIX),
    "margin": ("model=deit", *TINY, "recipe.augment.repeats=3", "task.margin_loss=0.5"),
}  # fmt: skip
FIGURES = {
    "label_maps": "token_labels",
    "teacher": "token_labels",
    "augmix": "jsd",
    "diversity": "diversity",
    "margin": "margin",
}


def prepare(folder: Path, name: str) -> tuple[str, ...]:
    """Write the files that a run needs below `folder`, and return its arguments."""
    if name == "teacher":
        torch.manual_seed(0)
        torch.save(timm.create_model("resnet10t", num_classes=10).state_dict(), folder / "teacher.pth")
    if name == "label_maps":
        images = Digits(image_size=16).images("train")
        for i, label in enumerate(images.labels):
            maps = torch.zeros(2, 2, 4, 4)
            maps[0, 0], maps[1, 0], maps[1, 1] = torch.rand(4, 4) + 4, int(label), (int(label) + 1) % 10
            path = folder / "maps" / f"{images.name(i)}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(maps.half(), path)
    return tuple(
        a.replace("=maps", f"={folder}/maps").replace("=teacher.pth", f"={folder}/teacher.pth") for a in RUNS[name]
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name != "mixpro" else ()) for name in RUNS]
)
def test_a_run_trains_and_logs_its_loss(cli, name):
    command = (*prepare(cli.folder, name), "hydra.run.dir=run", "recipe.epochs=1")
    outcome = cli.train(*command)
    assert outcome.code == 0, outcome.err
    assert result(cli.folder / "run")["metrics"]["test/top1"] >= 0
    figure = FIGURES.get(name)
    assert figure is None or float(rows(cli.folder / "run/metrics.csv")[-1][f"train/{figure}"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_the_same(tmp_path, name):
    settings = ("recipe.epochs=3", "trainer.limit_train_batches=8", "checkpoint.every_steps=1", "hydra.run.dir=run")
    assert_a_killed_run_ends_the_same((*prepare(tmp_path, name), *SMALL, *settings), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("task.mixed_labels=pal",), "task.mixed_labels must be transmix or mixpro or null, not 'pal'"),
        (("recipe.augment.maskmix={cells: 4}",), "augment.maskmix has no 'cells'. Did you mean 'cell'"),
        (("recipe.augment.jsd=12",), "augment.auto_augment must be AugMix, such as augmix-m3-w3, with augment.jsd"),
        (("model=lvvit", *TINY, "task.token_labels.source=nowhere"), "source=nowhere is no folder of label maps"),
    ],
)  # fmt: skip
def test_a_wrong_choice_is_one_line(cli, arguments, message):
    assert message in cli.train(*arguments).error


def test_a_missing_label_map_is_one_line(cli):
    arguments = prepare(cli.folder, "label_maps")
    for path in sorted((cli.folder / "maps/digits/train").iterdir())[:-1]:
        os.remove(path)
    error = cli.train(*arguments, "data.num_workers=1", "hydra.run.dir=run").error
    assert "there is no label map" in error
