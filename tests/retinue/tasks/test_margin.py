"""MultiGrain's margin loss against loops over its formulas, its draws against their probabilities, and a step of it."""

import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from retinue.tasks.classification import Classification
from retinue.tasks.margin import MarginLoss, copies_of, draw_negatives, run_with_features
from tests.models.test_losses import RECIPE

# Rows 0 to 6: three copies of image 5, two of image 8, one of image 2, and one of image 9
IMAGE = torch.tensor([5, 8, 5, 2, 8, 5, 9])


def unit_vectors(rows: int, dim: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)), dim=1)


def test_copies_are_the_other_rows_of_the_image():
    rows, known = copies_of(IMAGE, 2)
    found = [sorted(row[flag].tolist()) for row, flag in zip(rows, known, strict=True)]
    assert found == [[2, 5], [4], [0, 5], [], [1], [0, 2], []]
    # Nothing could be drawn against the copies of the only image.
    assert not copies_of(torch.tensor([3, 3, 3]), 2)[1].any()


def test_negatives_are_drawn_by_the_inverse_density_of_their_distance():
    dim, count = 4, 2
    # Row 0 has one negative nearer than the cut-off, two between, and one beyond the farthest distance.
    angles = [0.0, 2 * math.asin(0.1), 2 * math.asin(0.4), 2 * math.asin(0.6), 2 * math.asin(0.75)]
    unit = torch.tensor([[math.cos(a), math.sin(a), 0.0, 0.0] for a in angles])
    image = torch.arange(5)
    weights = np.zeros(5)
    for j in range(1, 5):
        d = max(float((unit[0] - unit[j]).norm()), 0.5)
        if d < 1.4:
            weights[j] = 1 / (d ** (dim - 2) * (1 - d * d / 4) ** ((dim - 3) / 2))
    share = weights / weights.sum()
    # Probability that row j is the first draw, or the second draw without repetition.
    second = [sum(share[i] * share[j] / (1 - share[i]) for i in range(5) if i != j) for j in range(5)]
    draws = torch.stack([draw_negatives(unit, image, count, seed)[0] for seed in range(4000)])
    assert (draws[:, 0] != draws[:, 1]).all()
    np.testing.assert_allclose(np.bincount(draws.flatten(), minlength=5) / 4000, share + second, atol=0.03)
    assert torch.equal(draw_negatives(unit, image, count, 7), draw_negatives(unit, image, count, 7))


def test_negatives_are_other_images_even_if_all_are_far_or_few():
    # Opposite vectors are farther than the farthest distance, and row 0 has one other image for two draws.
    unit = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [-1.0, 0, 0]])
    for seed in range(20):
        drawn = draw_negatives(unit, torch.tensor([4, 4, 6]), 2, seed)
        assert drawn[:2].tolist() == [[2, 2], [2, 2]] and set(drawn[2].tolist()) == {0, 1}


@pytest.mark.parametrize(("dim", "shift"), [(3, 0.0), (3, 1.0), (512, 0.0)])
def test_the_loss_is_the_mean_of_the_costs_that_are_not_zero(dim, shift):
    features, loss = 3 * unit_vectors(7, dim) + 3 * shift, MarginLoss(copies=3)
    features.requires_grad_()
    value = loss(features, IMAGE, seed=3)
    value.backward()
    unit = F.normalize(features.detach().double(), dim=1)
    negatives = draw_negatives(unit.float(), IMAGE, 2, 3)
    (rows, known), costs, slope = copies_of(IMAGE, 2), [], 0
    for i in range(7):
        for slot in range(2):
            if known[i, slot]:
                near = math.sqrt(float((unit[i] - unit[rows[i, slot]]).square().sum()) + 1e-8)
                far = math.sqrt(float((unit[i] - unit[negatives[i, slot]]).square().sum()) + 1e-8)
                costs += [max(0.0, near - 1.2 + 0.2), max(0.0, 1.2 - far + 0.2)]
                slope += (costs[-1] > 0) - (costs[-2] > 0)
    counted = [cost for cost in costs if cost > 0]
    assert len(costs) == 16 and len(counted) > 0
    assert value.item() == pytest.approx(sum(counted) / len(counted), rel=1e-5)
    assert loss.boundary.grad is not None and features.grad is not None
    assert float(loss.boundary.grad) == pytest.approx(slope / len(counted), abs=1e-6)
    assert features.grad.abs().sum() > 0 and (slope > 0) == (shift > 0)
    # One image alone has no loss.
    assert loss(features, torch.zeros(7).long(), seed=3).item() == 0


def make_task(net: Any, **changes: Any) -> Classification:
    augment = {"repeats": 3, "mixup": 0.0, "cutmix": 0.0, "maskmix": None, "jsd": None, "label_smoothing": 0.0}
    recipe = RECIPE | {"augment": augment | changes}
    task = Classification(net.train(), recipe, num_classes=3, distillation={"teacher": None}, margin_loss=0.25)
    task.prepare_training(None)
    task.trainer = cast(Any, SimpleNamespace(datamodule=SimpleNamespace(seed=1), global_step=4))
    task.track = lambda *_, **__: None
    return task


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet10t", {"zero_init_last": False}),
        ("swin_nano", {"depths": (1, 1), "heads": (2, 4)}),
        ("deit_tiny", {"depths": (1,)}),
    ],
)
def test_a_step_blends_the_losses_and_all_parameters_learn(name, args):
    torch.manual_seed(0)
    net: Any = timm.create_model(name, num_classes=3, **args)
    task = make_task(net)
    batch = {"image": torch.randn(7, 3, 32, 32), "label": IMAGE % 3, "index": IMAGE}
    loss = task.training_step(batch, 0)
    loss.backward()
    assert task.margin is not None
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    # The boundary's own gradient is 0 where as many costs rise with it as fall.
    assert task.margin.boundary.grad is not None
    features = net.forward_head(net.forward_features(batch["image"]), pre_logits=True)
    scores = net.get_classifier()(features)
    expected = 0.75 * F.cross_entropy(scores, batch["label"]) + 0.25 * task.margin(features, IMAGE, (1 << 32) | 4)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"repeats": 1}, "needs recipe.augment.repeats=3"),
        ({"cutmix": 1.0}, "needs whole images"),
        ({"jsd": 12}, "cannot be combined with recipe.augment.jsd"),
    ],
)
def test_what_does_not_fit_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        make_task(timm.create_model("resnet10t", num_classes=3), **changes)


def test_a_classifier_of_maps_is_refused():
    net = timm.create_model("resnet10t", num_classes=3, global_pool="")
    with pytest.raises(ValueError, match="reads one vector for each image"):
        run_with_features(net, torch.randn(2, 3, 32, 32))
