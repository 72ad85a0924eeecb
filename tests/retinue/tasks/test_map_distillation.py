"""Tests of the losses between maps, of their projections, and of classifiers that learn from maps."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retinue.tasks.classification import Classification
from retinue.tasks.distillation import Teacher, map_levels
from retinue.tasks.map_distillation import GRAM_SIDE, LOSSES, Level, MapDistillation, pair_maps
from retinue.tasks.optimization import create_optimizer
from tests.models.test_backbones import build
from tests.models.test_losses import RECIPE

BATCH = {"image": torch.randn(2, 3, 64, 64), "label": torch.tensor([0, 2]), "index": torch.tensor([0, 1])}
DATA = SimpleNamespace(
    mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2), image_size=64, in_chans=3, num_classes=3, class_names=["a", "b", "c"]
)


def distance_by_loops(loss: str, student: Tensor, teacher: Tensor, temperature: float) -> float:
    """Return a loss between maps (C, H, W) of one image by its definition, in float64 and without tensor functions."""
    C, H, W = teacher.shape
    places = [(y, x) for y in range(H) for x in range(W)]
    s, t = ({p: [float(m[c, p[0], p[1]]) for c in range(C)] for p in places} for m in (student, teacher))

    def unit(v: list[float]) -> list[float]:
        norm = math.sqrt(sum(a * a for a in v))
        return [a / norm for a in v]

    if loss == "mse":
        return sum((a - b) ** 2 for p in places for a, b in zip(s[p], t[p], strict=True)) / (C * H * W)
    if loss == "normalised_mse":
        pairs = ((unit(s[p]), unit(t[p])) for p in places)
        return sum(sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) for pair in pairs) / (H * W)
    if loss == "gram":
        total = 0.0
        for p in places:
            for q in places:
                cosines = [sum(a * b for a, b in zip(unit(m[p]), unit(m[q]), strict=True)) for m in (s, t)]
                total += (cosines[0] - cosines[1]) ** 2
        return total / len(places) ** 2
    total = 0.0
    for c in range(C):
        shares = []
        for m in (s, t):
            powers = [math.exp(m[p][c] / temperature) for p in places]
            shares.append([power / sum(powers) for power in powers])
        total += sum(b * math.log(b / a) for a, b in zip(*shares, strict=True))
    return total * temperature**2 / C


@pytest.mark.parametrize("loss", ["mse", "normalised_mse", "cwd", "gram"])
def test_losses_are_their_definitions(loss):
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 5) for _ in range(2))
    levels = [Level(3, 8)]
    value = MapDistillation(levels, levels, loss=loss, temperature=2.0)([student], [teacher]).item()
    expected = sum(distance_by_loops(loss, *pair, 2.0) for pair in zip(student, teacher, strict=True)) / 2
    assert value == pytest.approx(expected, rel=1e-5)


def test_gram_compares_the_means_of_a_large_map():
    student, teacher = (torch.randn(1, 2, 2 * GRAM_SIDE, GRAM_SIDE) for _ in range(2))
    levels = [Level(2, 4)]
    means = [F.avg_pool2d(x, (2, 1)) for x in (student, teacher)]
    distillation = MapDistillation(levels, levels, loss="gram")
    torch.testing.assert_close(distillation([student], [teacher]), distillation(means[:1], means[1:]))


def test_mgd_generates_the_teachers_map_from_the_places_that_are_not_masked():
    levels = [Level(3, 8)]
    distillation = MapDistillation(levels, levels, loss="mgd", masked=0.65)
    student, teacher = (torch.randn(2, 3, 40, 50) for _ in range(2))
    seen: list[Tensor] = []
    distillation.generators[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(1)
    value = distillation([student], [teacher])
    [inputs] = seen
    masked = (inputs == 0).all(1)
    assert masked.float().mean().item() == pytest.approx(0.65, abs=0.03)
    # All channels of a place are masked, or none is.
    torch.testing.assert_close(inputs, student * ~masked[:, None])
    first, _, second = cast(Any, distillation.generators[0])
    generated = F.conv2d(F.conv2d(inputs, first.weight, first.bias, padding=1).relu(), second.weight, second.bias, 1, 1)
    torch.testing.assert_close(value, (generated - teacher).square().mean())
    torch.manual_seed(1)
    torch.testing.assert_close(distillation([student], [teacher]), value, rtol=0, atol=0)


@pytest.mark.parametrize("loss", ["mse", "normalised_mse", "cwd", "gram"])
def test_a_teacher_that_is_the_student_leaves_no_loss(loss):
    levels = [Level(6, 4), Level(8, 8)]
    maps = [torch.randn(2, 6, 8, 8), torch.randn(2, 8, 4, 4)]
    distillation = MapDistillation(levels, levels, loss=loss)
    assert distillation(maps, maps).item() == pytest.approx(0, abs=1e-6)
    assert distillation(maps, [m.flip(-1) for m in maps]).item() > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_maps_of_other_widths_and_strides_are_projected_and_resized(loss):
    distillation = MapDistillation([Level(5, 8)], [Level(7, 16)], loss=loss, student=[0], teacher=[0])
    student, teacher = torch.randn(2, 5, 8, 6, requires_grad=True), torch.randn(2, 7, 4, 3)
    distillation([student], [teacher]).backward()
    assert student.grad is not None and student.grad.abs().max() > 0
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in distillation.parameters())
    assert bool(list(distillation.parameters())) == (loss != "gram")
    if loss == "mse":
        resized = F.interpolate(distillation.projections[0](student), (4, 3), mode="bilinear", align_corners=False)
        torch.testing.assert_close(distillation([student], [teacher]), F.mse_loss(resized, teacher))


def test_the_loss_is_the_sum_over_the_pairs():
    levels = [Level(6, 4), Level(8, 8)]
    student, teacher = ([torch.randn(2, 6, 8, 8), torch.randn(2, 8, 4, 4)] for _ in range(2))
    both = MapDistillation(levels, levels, loss="cwd")(student, teacher)
    parts = [
        MapDistillation(levels, levels, loss="cwd", student=[i], teacher=[i])([student[i]], [teacher[i]])
        for i in range(2)
    ]
    torch.testing.assert_close(both, parts[0] + parts[1])


PYRAMID, PLAIN = [Level(8, 4), Level(16, 8), Level(32, 16), Level(64, 32)], [Level(48, 16)] * 3


def test_the_last_maps_of_common_strides_are_compared():
    assert pair_maps(PYRAMID, PYRAMID, None, None) == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert pair_maps(PYRAMID, PLAIN, None, None) == ([2], [2])
    assert pair_maps(PLAIN, PYRAMID, None, None) == ([2], [2])
    assert pair_maps(PYRAMID, PLAIN, [0, 3], [1, 2]) == ([0, 3], [1, 2])


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ((None, None), "strides 4 and the teacher's 16, none in common: choose pairs, as .*student=.0. .*teacher=.2."),
        (([0], None), "must name equally many maps, not .0. and .."),
        (([0], [1, 2]), "must name equally many maps"),
        (([0], [3]), r"maps.teacher must be ascending indices from 0 to 2, not \[3\]"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(indices, message):
    with pytest.raises(ValueError, match=message):
        pair_maps(PYRAMID[:1], PLAIN, *indices)


def make_task(student: Any, teacher: str, **maps: Any) -> Classification:
    """Return a task with a small teacher, prepared for training."""
    settings = {"teacher": teacher, "weights": "unused", "mode": "soft", "alpha": 0.25, "temperature": 2.0}
    task = Classification(
        student.train(), RECIPE, num_classes=3, distillation={**settings, "maps": {"loss": "mse", **maps}}
    )
    torch.manual_seed(1)
    assert task.teacher is not None
    size: dict[str, Any] = {"img_size": 64, "depth": 2} if teacher.startswith("deit") else {}
    net: Any = timm.create_model(teacher, num_classes=3, **size)
    task.teacher.__dict__["net"] = net.eval().requires_grad_(False)
    task.teacher.__dict__["preprocessing"] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": 64}
    task.prepare_training(DATA)
    task.trainer = cast(Any, SimpleNamespace(datamodule=DATA, global_step=0))
    return task


@pytest.mark.parametrize(
    ("name", "args", "teacher", "pairs"),
    [
        ("swin_nano", {}, "resnet10t", ([0, 1, 2, 3], [0, 1, 2, 3])),
        ("deit_tiny", {"img_size": 64, "dim": 96}, "swin_nano", ([3], [3])),
        ("resnet10t", {}, "deit_tiny_patch16_224", ([3], [1])),
    ],
)
def test_a_classifier_learns_from_maps_of_any_teacher(name, args, teacher, pairs):
    net: Any = timm.create_model(name, num_classes=3) if name == "resnet10t" else build(name, num_classes=3, **args)
    task = make_task(net, teacher, weight=0.5)
    distillation: Any = task.map_distillation
    teacher_net: Any = cast(Teacher, task.teacher).net
    assert (distillation.student_indices, distillation.teacher_indices) == pairs
    # Batch statistics would change the running ones, and so the second pass.
    net.eval()
    loss = task.training_step(BATCH, 0)
    seen = (BATCH["image"] * torch.tensor(DATA.std).view(-1, 1, 1) + torch.tensor(DATA.mean).view(-1, 1, 1) - 0.5) / 0.5
    logits, scores = net(BATCH["image"]), teacher_net(seen)
    maps = [
        each.forward_intermediates(x, indices=indices, intermediates_only=True)
        for each, x, indices in ((net, BATCH["image"], pairs[0]), (teacher_net, seen, pairs[1]))
    ]
    between: Any = sum(
        F.mse_loss(layer(a), b) for layer, a, b in zip(distillation.projections, *maps, strict=True)
    )  # fmt: skip
    target = task.loss(logits, BATCH["label"])
    expected = cast(Teacher, task.teacher).blend(target, logits, scores) + 0.5 * between
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert task.running_figures()["train/maps"] == pytest.approx(between.item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in task.parameters())
    assert {key.partition(".")[0] for key in task.state_dict()} == {"model", "map_distillation"}


def test_the_projections_are_trained_and_do_not_count_as_the_net():
    net = build("swin_nano", num_classes=3)
    task = make_task(net, "resnet10t")
    task.trainer = cast(Any, SimpleNamespace(
        datamodule=SimpleNamespace(train_dataloader=lambda: range(4)), limit_train_batches=1.0,
        accumulate_grad_batches=1, global_step=0,
    ))  # fmt: skip
    task.recipe = {
        "epochs": 1, "batch_size": 4, "steps": None, "optimizer": {"name": "adamw", "lr": 1e-3, "lr_batch_size": 4,
        "weight_decay": 0.05, "layer_decay": 0.7},
        "schedule": {"kind": "cosine", "warmup_epochs": 0, "warmup_lr": 0.0, "min_lr": 0.0},
    }  # fmt: skip
    [optimizer], _ = task.configure_optimizers()
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in task.parameters()}
    rates = {
        id(p): group["lr"] * group.get("lr_scale", 1.0) for group in optimizer.param_groups for p in group["params"]
    }
    assert all(rates[id(p)] == 1e-3 for p in cast(nn.Module, task.map_distillation).parameters())
    assert len(create_optimizer(net, task.recipe).param_groups) < len(optimizer.param_groups)
    assert task.complexity(DATA) == make_bare(net).complexity(DATA)


def make_bare(net: nn.Module) -> Classification:
    return Classification(net, RECIPE, num_classes=3, distillation={"teacher": None})


@pytest.mark.parametrize(
    ("name", "args", "settings", "message"),
    [
        ("sparsifiner_small", {"dim": 192, "heads": 3}, {}, "cannot be combined with a net with auxiliary losses"),
        ("deit_tiny", {}, {"tokens": 1.0}, "cannot be combined with task.distillation.tokens"),
    ],
)
def test_what_needs_a_forward_pass_of_its_own_is_refused(name, args, settings, message):
    net = build(name, num_classes=3, img_size=64, **args)
    distillation = {
        "teacher": "resnet10t", "weights": None, "mode": "soft", "alpha": 0.5, "temperature": 1.0, "tokens": 0.0,
        "maps": {"loss": "cwd"}, **settings,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        Classification(net, RECIPE, num_classes=3, distillation=distillation)


class Deceiving(nn.Module):
    """A net whose `forward_intermediates` leaves something out."""

    feature_info = ({"num_chs": 3, "reduction": 1},)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(x.exp())

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return x, [x]

    def forward_head(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def test_a_net_whose_maps_do_not_lead_to_its_scores_is_refused():
    image = torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="a Deceiving as student does not give its scores and maps at once"):
        map_levels(Deceiving(), image, "student")
    with pytest.raises(ValueError, match="the teacher, a Linear, has no maps"):
        map_levels(nn.Linear(1, 1), image, "teacher")
