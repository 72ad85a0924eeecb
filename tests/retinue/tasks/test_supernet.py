"""Supernets' tasks: sorting with the optimiser's state, growing choices, and the target's moving average."""

import math
from typing import Any

import pytest
import timm
import torch

import models  # noqa: F401
from retinue.tasks.bossnas import BossNAS
from retinue.tasks.supernet import Supernet
from tests.models.supernets.test_hytra import SMALL
from tests.models.supernets.test_vit_resnas import supernet

AUGMENT = {"repeats": 4, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}
RECIPE: Any = {
    "optimizer": {"name": "adamw"}, "schedule": {"kind": "cosine"}, "loss": "ce", "bce_target_threshold": None,
    "augment": AUGMENT, "batch_size": 16, "ema": {"decay": None},
}  # fmt: skip


def test_sorting_moves_the_optimisers_state_with_the_weights(monkeypatch):
    task = Supernet(supernet(), RECIPE, warmup_epochs=3, num_classes=5, distillation={"teacher": None})
    optimizer = torch.optim.AdamW(task.parameters(), lr=0.0)
    task.model(torch.randn(2, 3, 56, 56)).square().sum().backward()
    optimizer.step()
    net: Any = task.model
    weight = net.stages[0].blocks[0].mlp.fc2.weight
    before = {
        tuple(w.tolist()): m.tolist() for w, m in zip(weight.T, optimizer.state[weight]["exp_avg"].T, strict=True)
    }
    old = weight.detach().clone()
    monkeypatch.setattr(task, "optimizers", lambda **kwargs: optimizer)
    task.sort_channels()
    assert not torch.equal(weight, old)
    for w, m in zip(weight.T, optimizer.state[weight]["exp_avg"].T, strict=True):
        assert before[tuple(w.tolist())] == m.tolist()


@pytest.mark.parametrize(("epoch", "warmup", "share"), [(0, 4, 0.0), (2, 4, 0.5), (9, 4, 1.0), (0, 0, 1.0)])
def test_the_choices_grow_in_the_first_epochs(epoch, warmup, share, monkeypatch):
    task = Supernet(supernet(), RECIPE, warmup_epochs=warmup, num_classes=5, distillation={"teacher": None})
    monkeypatch.setattr(Supernet, "current_epoch", epoch)
    task.on_train_batch_start({"seed": 0}, 0)
    assert task.model.share == share
    drawn = {int(value) for _ in range(20) for value in task.model.draw(4)[0].dim}
    assert drawn == ({24} if share < 1 else {24, 16})


def test_the_target_follows_ever_more_slowly():
    net: Any = timm.create_model("hytra_supernet", **SMALL)
    task = BossNAS(net, RECIPE, num_classes=10, momentum=0.9)
    with torch.no_grad():
        for online, _ in net.trained_pairs():
            online.add_(1.0)
    task.move_target(0.0)
    task.move_target(0.5)
    task.move_target(1.0)
    rest = 0.9 * (1 - 0.1 * (math.cos(math.pi / 2) + 1) / 2)
    for online, target in net.trained_pairs():
        torch.testing.assert_close(online - target, torch.full_like(online, rest))


def test_a_step_draws_different_paths_as_long_as_there_are_enough():
    net: Any = timm.create_model("hytra_supernet", **SMALL)
    task = BossNAS(net, RECIPE, num_classes=10, momentum=0.9)
    torch.manual_seed(0)
    assert all(len(set(task.draw_paths())) == 2 for _ in range(20))
    assert len({task.draw_paths()[0] for _ in range(50)}) == len(net.paths)
    many = BossNAS(net, RECIPE | {"augment": AUGMENT | {"repeats": 16}, "batch_size": 32}, num_classes=10, momentum=0.9)
    assert len(many.draw_paths()) == 8 and set(many.draw_paths()) == set(net.paths)
