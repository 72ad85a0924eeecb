"""Class weights against scikit-learn's and torch's definitions, and over ranks."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from retinue.tasks.class_weights import class_weights, weighted_mean
from retinue.tasks.classification import Classification

NAMES = ("a", "b", "c", "d")
RECIPE = {
    "loss": "ce", "bce_target_threshold": None, "augment": {"label_smoothing": 0.0},
    "optimizer": {"name": "adamw"}, "schedule": {"kind": "cosine"}, "class_weights": "balanced",
}  # fmt: skip


def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.random.default_rng(0).choice(3, 200, p=(0.7, 0.25, 0.05))
    weights = class_weights("balanced", NAMES, labels)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(weights, [*expected, 1], rtol=1e-6)
    assert weights[torch.from_numpy(labels)].mean().item() == pytest.approx(1)
    assert class_weights({"b": 3.0, "d": 0}, NAMES, labels).tolist() == [1, 3, 1, 0]


def make(**changes):
    task = Classification(
        torch.nn.Linear(4, 4), RECIPE | changes, num_classes=4, distillation={"teacher": None}, channels_last=False
    )
    task.class_weights = torch.tensor([0.5, 1.0, 4.0, 0.0])
    return task


def test_the_weighted_loss_is_torchs_times_the_mean_weight_of_the_batch():
    torch.manual_seed(0)
    logits, label = torch.randn(9, 4), torch.randint(4, (9,))
    task = make()
    weights = task.class_weights
    assert weights is not None
    expected = F.cross_entropy(logits, label, weight=weights) * weights[label].mean()
    torch.testing.assert_close(task.loss(logits, label), expected)
    # Two ranks with equal numbers of images have the mean of the batch.
    parts = torch.stack([task.loss(logits[rows], label[rows]) for rows in (slice(0, 4), slice(4, 8))])
    torch.testing.assert_close(parts.mean(), task.loss(logits[:8], label[:8]))
    # Labels as soft targets, and a mixture of two images' labels
    one_hot = F.one_hot(label, 4).float()
    torch.testing.assert_close(task.loss(logits, one_hot), expected)
    mixed = 0.3 * one_hot + 0.7 * one_hot.flip(0)
    losses = F.cross_entropy(logits, mixed, reduction="none")
    torch.testing.assert_close(
        task.loss(logits, mixed), (losses * (0.3 * weights[label] + 0.7 * weights[label].flip(0))).mean()
    )


def test_binary_cross_entropy_is_weighted_by_image_and_weights_of_one_change_nothing():
    logits, label = torch.randn(6, 4), torch.randint(4, (6,))
    losses = F.binary_cross_entropy_with_logits(logits, F.one_hot(label, 4).float(), reduction="none").mean(1)
    task = make(loss="bce")
    assert task.class_weights is not None
    torch.testing.assert_close(task.loss(logits, label), (losses * task.class_weights[label]).mean())
    for loss in ("ce", "bce"):
        for smoothing in (0.0, 0.2):
            augment = {"label_smoothing": smoothing}
            weighted, plain = make(loss=loss, augment=augment), make(loss=loss, augment=augment, class_weights=None)
            weighted.class_weights, plain.class_weights = torch.ones(4), None
            torch.testing.assert_close(weighted.loss(logits, label), plain.loss(logits, label))


def test_weighted_mean_takes_losses_of_half_precision():
    losses, weights = torch.ones(2, dtype=torch.bfloat16), torch.tensor([1.0, 3.0])
    assert weighted_mean(losses, torch.tensor([[0.5, 0.5], [0, 1]], dtype=torch.bfloat16), weights) == 2.5
