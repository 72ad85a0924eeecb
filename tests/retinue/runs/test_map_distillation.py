"""Runs that learn from a teacher's maps: from the command line, killed and resumed, by two processes, and refused."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from omegaconf import open_dict

from datamodules.scenes import write_scenes
from models.weights import load_weights
from retinue.runs.identity import run_folder
from tests.retinue.runs.cli import SMALL, result, rows, start
from tests.retinue.runs.test_config import composed
from tests.retinue.runs.test_ddp import trained
from tests.retinue.runs.test_dense import command
from tests.retinue.runs.test_resume import assert_a_killed_run_ends_the_same

MAPS = "task.distillation.maps"


def teach(folder: Path, loss: str) -> tuple[str, ...]:
    """Write a teacher's weights below `folder`, and return the arguments of a run that learns from its maps."""
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t", num_classes=10).state_dict(), folder / "teacher.pth")
    weights = f"task.distillation.weights={folder / 'teacher.pth'}"
    return "task.distillation.teacher=resnet10t", weights, f"{MAPS}.loss={loss}"


def test_a_student_learns_from_maps_and_is_tested_without_its_teacher(cli):
    arguments = (*teach(cli.folder, "cwd"), f"{MAPS}.weight=0.5", "hydra.run.dir=run", "recipe.epochs=1")
    outcome = cli.train(*arguments)
    assert outcome.code == 0, outcome.err
    assert float(rows("run/metrics.csv")[-1]["train/maps"]) > 0
    path = cli.folder / "run/checkpoints/best.ckpt"
    names = {name.split(".")[0] for name in torch.load(path, weights_only=True)["state_dict"]}
    assert names == {"model", "map_distillation"}
    # The net is loaded without its projections, which count neither as parameters nor as MACs.
    net: Any = timm.create_model("swin_nano", num_classes=10, in_chans=3)
    assert not load_weights(net, path).missing
    assert result(cli.folder / "run")["params"] == sum(p.numel() for p in net.parameters())
    (cli.folder / "teacher.pth").unlink()
    evaluated = cli("eval", "run=run", "trainer=cpu", "data.num_workers=0")
    assert evaluated.code == 0, evaluated.err
    [evaluation] = (cli.folder / "run/evaluation").iterdir()
    assert result(evaluation)["params"] == result(cli.folder / "run")["params"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((f"{MAPS}.loss=cdw",), "maps.loss must be one of mse, normalised_mse, cwd, gram, mgd, or null, not 'cdw'"),
        ((f"{MAPS}.masked=2",), f"{MAPS}.masked must be a number from 0 to 1, not 2"),
        (("task.distillation.teacher=resnet10t", f"{MAPS}.loss=mse", "trainer.strategy=fsdp"), "fsdp does not shard"),
        (
            ("task=detection", "task.distillation.teacher=gone.ckpt", f"{MAPS}.loss=null"),
            "task.distillation.teacher needs task.distillation.maps.loss, such as cwd",
        ),
        (
            ("task=detection", "task.distillation.part=logits"),
            "task.distillation.part must be backbone or neck, not 'logits'",
        ),
    ],
)
def test_a_wrong_choice_is_one_line(cli, arguments, message):
    assert message in cli.train(*arguments).error


def test_keys_of_maps_change_the_folder_only_if_maps_are_compared(tmp_path):
    def folder(*overrides: str) -> str:
        return run_folder(composed(*overrides))

    with_teacher = ("task.distillation.teacher=resnet50",)
    for before, off, on in (
        ((), (f"{MAPS}.loss=cwd",), (*with_teacher, f"{MAPS}.loss=cwd")),
        (with_teacher, (*with_teacher, f"{MAPS}.weight=2.0"), (*with_teacher, f"{MAPS}.loss=cwd")),
    ):
        cfg: Any = copy.deepcopy(composed(*before))
        with open_dict(cfg):
            del cfg.task.distillation.maps
        assert run_folder(cfg) == folder(*before) == folder(*off) != folder(*on)
    for task in ("detection", "segmentation"):
        cfg = copy.deepcopy(composed(f"task={task}"))
        with open_dict(cfg):
            del cfg.task.distillation
        assert run_folder(cfg) == folder(f"task={task}") == folder(f"task={task}", f"{MAPS}.weight=2.0")
        paths = [tmp_path / task / name for name in ("a.ckpt", "b.ckpt", "c.ckpt")]
        paths[0].parent.mkdir()
        for path, content in zip(paths, ("one", "one", "other"), strict=True):
            path.write_text(content)
        one, same, other = (folder(f"task={task}", f"task.distillation.teacher={path}") for path in paths)
        # The content of the teacher's checkpoint counts, not its path.
        assert one == same != other and one != run_folder(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mgd", "gram"])
def test_a_killed_student_ends_the_same(loss, tmp_path):
    net = ("model=swin", "model.size=nano", "+model.args.drop_path_rate=0.2", "recipe.ema.decay=0.5")
    settings = ("recipe.epochs=3", "trainer.limit_train_batches=8", "checkpoint.every_steps=1", "hydra.run.dir=run")
    assert_a_killed_run_ends_the_same((*teach(tmp_path, loss), *net, *SMALL, *settings), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_killed_student_under_a_head_ends_the_same(task, tmp_path):
    write_scenes(tmp_path / "scenes", {"train": 12, "val": 4, "test": 3})
    # retinanet is quicker than the default head.
    head = ("head=retinanet",) if task == "detection" else ()
    arguments = (*command(task, tmp_path / "scenes"), *head)
    run = start("train", *arguments, "recipe.epochs=1", "hydra.run.dir=teacher", folder=tmp_path)
    _, err = run.communicate(timeout=400)
    assert run.returncode == 0, err
    loss = (f"{MAPS}.loss=mgd", "task.distillation.part=neck") if task == "detection" else ()
    teacher = f"task.distillation.teacher={tmp_path / 'teacher/checkpoints/best.ckpt'}"
    assert_a_killed_run_ends_the_same((*arguments, teacher, *loss), tmp_path)
    saved = result(tmp_path / "whole/run")
    assert (saved["params"], saved["macs"]) == tuple(result(tmp_path / "teacher")[key] for key in ("params", "macs"))
    assert float(rows(tmp_path / "whole/run/metrics.csv")[-1]["train/loss_maps"]) > 0
    shutil.rmtree(tmp_path / "teacher")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    states, logs = [], []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        arguments = (*teach(tmp_path, "cwd"), f"trainer.devices={devices}", "recipe.augment.mixup=0.0")
        state, _ = trained(folder, *arguments)
        states.append(state["state_dict"])
        logs.append([float(row["train/maps"]) for row in rows(folder / "run/metrics.csv") if row["train/maps"]])
    assert any(name.startswith("map_distillation.") for name in states[0])
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=1e-4), name
    assert logs[0] and logs[0] == pytest.approx(logs[1], rel=1e-3)
