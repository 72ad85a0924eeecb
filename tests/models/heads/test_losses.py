"""Losses of segmentation equal their definitions as loops, with their gradients."""

import math

import numpy as np
import pytest
import torch

from models.heads.losses import LOSSES, create_losses, signed_distances
from tests.models.openmmlab import CLASSES, build

WEIGHTS = [0.5, 2.0, 1.0, 3.0]


def by_loops(name, logits, mask, weights, **parameters):
    """Compute a loss pixel by pixel, from logits (B, K, H, W) and a mask (B, H, W); the result has a gradient."""
    B, K, H, W = logits.shape
    pixels = [(b, y, x) for b in range(B) for y in range(H) for x in range(W) if mask[b, y, x] != 255]
    exps = logits.exp()
    p = {(b, k, y, x): exps[b, k, y, x] / exps[b, :, y, x].sum() for b, y, x in pixels for k in range(K)}
    true = {(b, y, x): int(mask[b, y, x]) for b, y, x in pixels}
    if name in ("cross_entropy", "focal"):
        gamma = {"cross_entropy": 0.0}.get(name, parameters.get("gamma", 2.0))
        total, norm = 0 * logits.sum(), 0.0
        for (b, y, x), k in true.items():
            q = p[b, k, y, x]
            total, norm = total - weights[k] * (1 - q) ** gamma * q.log(), norm + weights[k]
        return total / norm if norm else total
    total, norm = 0 * logits.sum(), 0.0
    for k in set(true.values()):
        if name == "boundary":
            loss = sum(p[b, k, y, x] * distance(mask[b], k, y, x) for b, y, x in pixels) / len(pixels)
        else:
            alpha, beta = parameters.get("alpha", 0.3), parameters.get("beta", 0.7)
            alpha, beta = (0.5, 0.5) if name == "dice" else (alpha, beta)
            tp = sum(p[b, k, y, x] for (b, y, x), t in true.items() if t == k)
            fp = sum(p[b, k, y, x] for (b, y, x), t in true.items() if t != k)
            fn = sum(1 - p[b, k, y, x] for (b, y, x), t in true.items() if t == k)
            loss = 1 - tp / (tp + alpha * fp + beta * fn)
        total, norm = total + weights[k] * loss, norm + weights[k]
    return total / norm if norm else total


def distance(mask, k, y, x):
    """Return the signed distance of the pixel (y, x) of a mask (H, W) from class k, by comparing all pixels."""
    places = [(i, j, int(mask[i, j])) for i in range(mask.shape[0]) for j in range(mask.shape[1])]
    inside = [math.hypot(i - y, j - x) for i, j, label in places if label == k]
    outside = [math.hypot(i - y, j - x) for i, j, label in places if label not in (k, 255)]
    if not inside or not outside:
        return 0.0
    return 1 - min(outside) if mask[y, x] == k else min(inside)


def masks():
    """Yield masks: mixed, with a class absent, of one class, of ignored pixels in one image or in all, of one pixel."""
    rng = np.random.default_rng(0)
    mixed = rng.choice([0, 1, 2, 3, 255], (2, 4, 5), p=[0.3, 0.2, 0.2, 0.1, 0.2])
    yield "mixed", mixed
    yield "absent", np.where(mixed == 3, 0, mixed)
    yield "one class", np.full((1, 3, 4), 2)
    yield "one image ignored", np.stack([mixed[0], np.full((4, 5), 255)])
    yield "all ignored", np.full((2, 2, 3), 255)
    yield "one pixel", np.full((1, 1, 1), 1)


CASES = [
    (name, parameters)
    for name, choices in {
        "cross_entropy": [{}], "focal": [{}, {"gamma": 0.5}], "dice": [{}],
        "tversky": [{}, {"alpha": 0.0, "beta": 1.0}, {"alpha": 2.0, "beta": 0.0}], "boundary": [{}],
    }.items() for parameters in choices
]  # fmt: skip


@pytest.mark.parametrize("mask", [pytest.param(mask, id=name) for name, mask in masks()])
@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_a_loss_and_its_gradient_equal_the_definition(name, parameters, mask):
    torch.manual_seed(0)
    mask = torch.from_numpy(mask)
    logits = torch.randn(len(mask), 4, *mask.shape[1:], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    loss = LOSSES[name](logits, mask, weights, **parameters)
    expected = by_loops(name, logits, mask, WEIGHTS, **parameters)
    (ours,), (theirs,) = (torch.autograd.grad(value, logits) for value in (loss, expected))
    # Distances are float32.
    rtol, atol = (1e-6, 1e-7) if name == "boundary" else (1e-9, 1e-12)
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("name", "parameters"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confident_logits_give_finite_losses_and_gradients(name, parameters, dtype):
    mask = torch.tensor([[[0, 1], [2, 255]]])
    logits = torch.zeros(1, 4, 2, 2, dtype=dtype)
    logits[0, 0] = 200.0
    (module,) = create_losses({name: parameters}, None, 4)
    logits.requires_grad_()
    loss = module(logits, mask, weight=None, ignore_index=255)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert logits.grad is not None and logits.grad.isfinite().all() and not logits.grad[..., 1, 1].any()


def test_distances_are_those_of_the_boundary_losses_paper():
    """Around a square of 3 x 3, the distance is 0 at its border, -1 in its middle, and 1 beside it."""
    mask = np.zeros((1, 6, 6), np.uint8)
    mask[0, 1:4, 1:4] = 1
    inside = signed_distances(mask, 2)[0, 1]
    assert inside[1:4, 1:4].tolist() == [[0, 0, 0], [0, -1, 0], [0, 0, 0]]
    assert inside[0, 2] == 1 and inside[0, 0] == pytest.approx(math.sqrt(2)) and inside[5, 2] == 2


@pytest.mark.parametrize("head", ["semantic_fpn", "upernet", "vwformer"])
def test_heads_with_logits_per_pixel_train_by_the_losses(head):
    """The decode head's losses are those of its logits; an auxiliary head has 0.4 of them."""
    torch.manual_seed(1)
    image, mask = torch.randn(2, 3, 64, 96), torch.randint(0, CLASSES, (2, 8, 12)).repeat_interleave(8, 1)
    mask = mask.repeat_interleave(8, 2)
    mask[:, :9] = 255
    weights = [1.0, 0.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    chosen = {"cross_entropy": 1, "tversky": {"weight": 0.5, "beta": 0.9}}
    net = build(head, losses=chosen, class_weights=weights).eval()
    losses = net.loss(image, mask)
    prefix = "" if head == "vwformer" else "decode."
    expected = {f"{prefix}loss_{loss}" for loss in chosen}
    assert set(losses) == expected | ({f"aux.loss_{loss}" for loss in chosen} if head == "upernet" else set())
    logits = net.logits(image)
    for loss in create_losses(chosen, weights, CLASSES):
        torch.testing.assert_close(losses[f"{prefix}{loss.loss_name}"], loss(logits, mask), rtol=1e-4, atol=1e-5)
    assert not [name for name in net.state_dict() if "loss" in name]
    if head == "upernet":
        assert losses["aux.loss_cross_entropy"] < 0.6 * losses["decode.loss_cross_entropy"]
    net.train()
    torch.stack([*net.loss(image, mask).values()]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("losses", "weights", "message"),
    [
        ({"dise": 1}, None, "task.losses has 'dise'. Did you mean 'dice'?"),
        ({"focal": {"gama": 1}}, None, "task.losses.focal takes weight, gamma, not 'gama'. Did you mean 'gamma'?"),
        ({"focal": {"gamma": -1}}, None, "task.losses.focal.gamma must be a number, 0 or more, not -1"),
        ({"dice": 1}, [1.0, 2.0], "task.class_weights must be 7 numbers"),
    ],
)
def test_wrong_losses_are_one_line(losses, weights, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        build("vwformer", losses=losses, class_weights=weights)


def test_a_head_with_its_own_loss_says_so():
    with pytest.raises(ValueError, match=r"head=mask2former has a loss of its own.*head=semantic_fpn, upernet or"):
        build("mask2former", losses={"dice": 1})
