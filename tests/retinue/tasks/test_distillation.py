"""Tests of distillation in the task: scores, the distillation token, tokens."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy

from models import load_weights
from retinue.tasks.classification import Classification
from tests.models.test_backbones import build
from tests.models.test_losses import RECIPE

BATCH = {"image": torch.randn(2, 3, 64, 64), "label": torch.tensor([0, 2]), "index": torch.tensor([0, 1])}
TEACHER = {
    "teacher": "deit_tiny_patch16_224", "weights": "unused", "mode": "hard", "alpha": 0.25, "temperature": 1.0,
    "tokens": 0.0,
}  # fmt: skip
DATA = SimpleNamespace(datamodule=SimpleNamespace(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)), global_step=0)


def make_task(net: Any, **distillation: Any) -> tuple[Classification, Any]:
    """Return a task with a small teacher of timm's, and the teacher."""
    task = Classification(net.train(), RECIPE, num_classes=3, distillation=TEACHER | distillation)
    task.trainer = cast(Any, DATA)
    torch.manual_seed(1)
    teacher: Any = timm.create_model("deit_tiny_patch16_224", depth=2, num_classes=3, img_size=64).eval()
    assert task.teacher is not None
    task.teacher.__dict__["net"] = teacher
    task.teacher.__dict__["preprocessing"] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": 64}
    return task, teacher


def test_a_distillation_token_alone_learns_from_the_teacher():
    net = build("deit_tiny_distilled", num_classes=3, img_size=64)
    task, teacher = make_task(net)
    scores, distilled = net(BATCH["image"])
    labels = teacher(BATCH["image"]).argmax(1)
    hard = F.cross_entropy(distilled, labels)
    expected = 0.75 * LabelSmoothingCrossEntropy(0.1)(scores, BATCH["label"]) + 0.25 * hard
    assert torch.allclose(task.training_step(BATCH, 0), expected)
    task.eval().validation_step(BATCH, 0)


@pytest.mark.parametrize("name", ["deit_tiny", "sparsifiner_small"])
def test_tokens_are_compared_by_weight_and_logged(name):
    net = build(name, num_classes=3, img_size=64, dim=192, heads=3)
    task, teacher = make_task(net, mode="soft", tokens=0.5)
    loss = task.training_step(BATCH, 0)
    _, losses = net.forward_with_losses(BATCH["image"])
    tokens = F.mse_loss(net.forward_features(BATCH["image"])[:, 1:], teacher.forward_features(BATCH["image"])[:, 1:])
    figures = task.running_figures()
    assert figures["train/tokens"] == pytest.approx(tokens.item(), rel=1e-5)
    assert set(figures) == {"train/loss", "train/top1", "train/tokens", *(f"train/{key}" for key in losses)}
    task.teacher.tokens = 0.0  # pyright: ignore[reportOptionalMemberAccess]
    assert torch.allclose(loss - task.training_step(BATCH, 0), 0.5 * tokens, atol=1e-5)


def test_lvvits_tokens_are_compared_by_their_scores():
    net, teacher = (build(name, num_classes=3, img_size=64) for name in ("sparsifiner_lvvit_small", "lvvit_small"))
    load_weights(net, teacher.state_dict(), strict=False)
    task, _ = make_task(net, tokens=1.0)
    assert task.teacher is not None
    task.teacher.__dict__["net"] = teacher.eval()
    _, target = task.teacher.answer(BATCH["image"], (0.5,) * 3, (0.5,) * 3)
    assert target is not None and target.shape == (2, 16, 3)
    assert torch.allclose(target, teacher.aux_head(teacher.forward_features(BATCH["image"])[:, 1:]), atol=1e-5)
    task.training_step(BATCH, 0)
    assert task.running_figures()["train/tokens"] > 0


def test_pyramids_have_no_token_distillation():
    with pytest.raises(ValueError, match=r"task.distillation.tokens needs a ViT-shaped net of Retinue's"):
        make_task(build("swin_nano", num_classes=3), tokens=0.5)
