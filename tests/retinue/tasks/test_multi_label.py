"""The losses of multi-label classification against their definitions and timm's."""

import math

import pytest
import torch
from timm.loss import AsymmetricLossMultiLabel

from retinue.tasks.multi_label import MultiLabel, asymmetric_loss

ASL = {"gamma_positive": 0.0, "gamma_negative": 4.0, "margin": 0.05}
RECIPE = {
    "loss": "bce", "bce_target_threshold": None, "augment": {"label_smoothing": 0.0},
    "optimizer": {"name": "adamw"}, "schedule": {"kind": "cosine"},
}  # fmt: skip


def definition(logits, target, gamma_positive, gamma_negative, margin):
    """Compute the loss of each image in loops over float64."""
    sums = []
    for row, targets in zip(logits.double().tolist(), target.tolist(), strict=True):
        total = 0.0
        for x, y in zip(row, targets, strict=True):
            p = 1 / (1 + math.exp(-x))
            q = max(p - margin, 0)
            total -= y * (1 - p) ** gamma_positive * math.log(p)
            total -= (1 - y) * q**gamma_negative * math.log(1 - q)
        sums.append(total)
    return sums


@pytest.mark.parametrize(("positive", "negative", "margin"), [(0.0, 4.0, 0.05), (1.0, 2.0, 0.2), (0.0, 0.0, 0.0)])
def test_the_asymmetric_loss_is_that_of_the_paper_and_of_timm(positive, negative, margin):
    torch.manual_seed(0)
    logits, target = 2 * torch.randn(6, 5, requires_grad=True), (torch.rand(6, 5) < 0.4).float()
    loss = asymmetric_loss(logits, target, positive, negative, margin)
    expected = definition(logits.detach(), target, positive, negative, margin)
    torch.testing.assert_close(loss.tolist(), expected, rtol=1e-5, atol=1e-7)
    theirs = AsymmetricLossMultiLabel(gamma_neg=negative, gamma_pos=positive, clip=margin)
    # Versions of timm differ in the reduction over the images, so each is a batch.
    by_image = torch.stack([theirs(logits[i : i + 1], target[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(loss, by_image, rtol=1e-5, atol=1e-6)
    if not positive and not negative and not margin:
        bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)
        torch.testing.assert_close(loss, bce)
    soft = torch.rand(6, 5)
    parts = [asymmetric_loss(logits, part, positive, negative, margin) for part in (soft, 1 - soft)]
    whole = [asymmetric_loss(logits, part, positive, negative, margin) for part in (soft * 0, soft * 0 + 1)]
    torch.testing.assert_close(parts[0] + parts[1], whole[0] + whole[1])


def test_extreme_scores_have_a_finite_loss_and_gradient():
    logits = torch.tensor([[80.0, -80.0, 0.0]], requires_grad=True)
    for target in (torch.zeros(1, 3), torch.ones(1, 3)):
        asymmetric_loss(logits, target, **ASL).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def make(**changes):
    return MultiLabel(torch.nn.Linear(4, 3), RECIPE | changes, num_classes=3, asl=ASL, channels_last=False)


def test_smoothing_and_the_threshold_change_the_targets():
    logits, target = torch.randn(2, 3), torch.tensor([[1, 0, 0], [0.4, 1, 0.6]])
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    assert make().loss(logits, target) == bce(logits, target)
    smoothed = make(augment={"label_smoothing": 0.2}).loss(logits, target)
    torch.testing.assert_close(smoothed, bce(logits, target * 0.8 + 0.1))
    hard = make(bce_target_threshold=0.5).loss(logits, target)
    torch.testing.assert_close(hard, bce(logits, (target > 0.5).float()))
    asl = make(loss="asl").loss(logits, target)
    torch.testing.assert_close(asl, asymmetric_loss(logits, target, **ASL).mean())
    with pytest.raises(ValueError, match=r"recipe\.loss must be bce or asl for task=multi_label, not 'ce'"):
        make(loss="ce")
