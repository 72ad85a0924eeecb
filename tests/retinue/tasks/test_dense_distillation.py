"""Tests of detectors and segmentors that learn from the maps of a trained one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from datamodules.scenes import write_scenes
from retinue.runs.training import build_data, build_task, save_config
from retinue.tasks.dense_distillation import levels, part_of
from tests.models.openmmlab import DETECTORS, SEGMENTORS, build
from tests.retinue.runs.test_config import composed

SIDES = {"detection": [96, 120], "segmentation": [64, 64]}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, {"train": 2, "val": 1, "test": 1})
    return folder


def make(scenes: Path, task: str, *overrides: str) -> tuple[Any, Any, Any]:
    """Return a config, its data and its task with initial weights."""
    cfg = composed(
        f"task={task}", "logger=none", "model=swin", "model.size=nano", "recipe.batch_size=2", "data.num_workers=0",
        f"data.root={scenes}", f"data.image_size={SIDES[task]}",
        *(("recipe.augment.crop=[64,64]",) if task == "segmentation" else ()), *overrides,
    )  # fmt: skip
    data = build_data(cfg)
    return cfg, data, build_task(cfg, data)


def save_run(folder: Path, cfg: Any, data: Any, task: Any) -> str:
    """Write the files of a run that a teacher is read from; return the path of its checkpoint."""
    (folder / "checkpoints").mkdir(parents=True)
    save_config(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in ("hydra", "run_dir")]), folder)
    data.classes_of_net.write(folder / "classes.json")
    path = folder / "checkpoints" / "best.ckpt"
    torch.save({"state_dict": task.state_dict()}, path)
    return str(path)


@pytest.fixture(scope="module")
def teachers(scenes, tmp_path_factory) -> dict[str, tuple[str, Any]]:
    """Checkpoint and task of a trained net of each task; with another normalisation than the students'."""
    torch.manual_seed(0)
    made = {}
    for task, head in (("detection", "retinanet"), ("segmentation", "semantic_fpn")):
        cfg, data, trained = make(scenes, task, f"head={head}", "data.mean=[0.3,0.4,0.5]", "data.std=[0.2,0.2,0.3]")
        made[task] = (save_run(tmp_path_factory.mktemp(task) / "run", cfg, data, trained), trained)
    return made


def prepared(scenes: Path, task: str, teacher: str, *overrides: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return a student, ready for a training step, its data and a batch."""
    torch.manual_seed(1)
    _, data, student = make(scenes, task, f"task.distillation.teacher={teacher}", *overrides)
    student.prepare_training(data)
    student.trainer = type("Trainer", (), {"datamodule": data, "global_step": 0})()
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    return student.train(), data, batch


def seen_by_teacher(image: torch.Tensor, data: Any) -> torch.Tensor:
    own, others = (
        [torch.tensor(v).view(-1, 1, 1) for v in pair]
        for pair in ((data.mean, data.std), ([0.3, 0.4, 0.5], [0.2, 0.2, 0.3]))
    )
    return (image * own[1] + own[0] - others[0]) / others[1]


def cwd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    shares = [x.flatten(2).softmax(-1) for x in (student, teacher)]
    return (shares[1] * (shares[1] / shares[0]).log()).sum(-1).mean()


@pytest.mark.parametrize("part", ["neck", pytest.param("backbone", marks=pytest.mark.slow)])
def test_a_detector_learns_from_the_maps_of_another(part, scenes, teachers):
    path, trained = teachers["detection"]
    arguments = ("head=retinanet", f"task.distillation.part={part}", "task.distillation.maps.weight=0.5")
    student, data, batch = prepared(scenes, "detection", path, *arguments)
    torch.manual_seed(2)
    loss = student.training_step(batch, 0)
    figures = student.running_figures()
    torch.manual_seed(2)
    own, others = (
        student.model.backbone(batch["image"]),
        trained.model.eval().backbone(seen_by_teacher(batch["image"], data)),
    )
    if part == "neck":
        own, others = student.model.neck(own), trained.model.neck(others)
    expected = 0.5 * torch.stack([cwd(a, b) for a, b in zip(own, others, strict=True)]).sum()
    assert figures["train/loss_maps"] == pytest.approx(expected.item(), rel=1e-3)
    assert sum(value for name, value in figures.items() if name != "train/loss") == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    assert [name for name, p in student.named_parameters() if p.grad is None and p.requires_grad] == []
    # The softmax over the one place of a neck's coarsest map is constant.
    projections = list(student.map_distillation.projections)[:3]
    assert all(layer.weight.grad.abs().max() > 0 for layer in projections)
    # The teacher has no part in the student's checkpoints.
    assert {key.partition(".")[0] for key in student.state_dict()} == {"model", "map_distillation"}


@pytest.mark.parametrize("head", [pytest.param("semantic_fpn", marks=pytest.mark.slow), "fpn_lite"])
def test_a_segmentor_learns_from_the_logits_of_another(head, scenes, teachers):
    path, trained = teachers["segmentation"]
    student, data, batch = prepared(scenes, "segmentation", path, f"head={head}")
    assert not list(student.map_distillation.parameters())
    own, others = [], []
    for outputs, net in ((own, student.model), (others, trained.model)):
        part_of(net, "logits").register_forward_hook(
            lambda module, args, output, outputs=outputs: outputs.append(output)
        )
    student.training_step(batch, 0)
    trained.model.eval().logits(seen_by_teacher(batch["image"], data))
    assert own[0].shape[1] == data.num_classes
    resized = F.interpolate(own[0], others[0].shape[2:], mode="bilinear", align_corners=False)
    assert student.running_figures()["train/loss_maps"] == pytest.approx(cwd(resized, others[0]).item(), rel=1e-3)


@pytest.mark.parametrize("part", ["logits", *(pytest.param(p, marks=pytest.mark.slow) for p in ("neck", "backbone"))])
def test_a_student_with_the_teachers_weights_has_no_loss(part, scenes, teachers):
    path, trained = teachers["segmentation"]
    same = ("head=semantic_fpn", "data.mean=[0.3,0.4,0.5]", "data.std=[0.2,0.2,0.3]", f"task.distillation.part={part}")
    student, _, batch = prepared(scenes, "segmentation", path, *same)
    student.model.load_state_dict(trained.model.state_dict())
    student.eval().training_step(batch, 0)
    assert student.running_figures()["train/loss_maps"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        next(student.model.backbone.parameters()).mul_(1.5)
    student.model.loss(batch["image"], batch["mask"])
    assert student.distillation_losses(batch["image"])["loss_maps"].item() > 1e-6


def test_a_student_without_its_teacher_is_built_for_a_test(scenes):
    _, _, task = make(scenes, "segmentation", "task.distillation.teacher=gone/checkpoints/best.ckpt")
    assert task.map_distillation is None and task.distillation_losses(torch.zeros(1, 3, 64, 64)) == {}


def test_teachers_that_do_not_fit_are_refused(scenes, teachers, tmp_path):
    path = teachers["segmentation"][0]
    for task, teacher, message in (
        ("segmentation", str(tmp_path / "best.ckpt"), "must be a checkpoint in the folder of a run"),
        ("detection", path, "is of a run with task=segmentation, not of this task"),
    ):
        with pytest.raises(ValueError, match=message):
            prepared(scenes, task, teacher)
    _, data, student = make(scenes, "segmentation", f"task.distillation.teacher={path}")
    data.class_names = [*reversed(data.class_names)]
    with pytest.raises(ValueError, match="same classes in the same order"):
        student.prepare_training(data)


@pytest.mark.parametrize(
    ("head", "part", "missing"), [("mask2former", "logits", "logits"), ("fpn_lite", "neck", "neck")]
)
def test_parts_that_a_head_lacks_are_refused(head, part, missing):
    with torch.device("meta"):
        net = build(head, "swin", model__size="nano")
    with pytest.raises(ValueError, match=f"with this head has no {missing}.*part=backbone works"):
        part_of(net, part)


@pytest.mark.slow
@pytest.mark.parametrize("head", [*DETECTORS, *SEGMENTORS])
def test_the_parts_of_every_head_have_the_levels_that_they_return(head):
    net = build(head, "swin", model__size="nano").eval()
    maps = net.backbone(torch.zeros(1, 3, 256, 256))
    assert [(level.channels, 256 // level.stride) for level in levels(net, "backbone")] == [
        (m.shape[1], m.shape[2]) for m in maps
    ]
    if isinstance(getattr(net, "neck", None), torch.nn.Module):
        assert [(level.channels, 256 // level.stride) for level in levels(net, "neck")] == [
            (m.shape[1], m.shape[2]) for m in net.neck(maps)
        ]
