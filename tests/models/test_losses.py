"""Auxiliary losses of ops reach the training through every base class, and nothing of them stays on the net."""

import copy

import pytest
import torch
from timm.loss import LabelSmoothingCrossEntropy
from torch import nn

from ops.losses import loss_weights
from ops.registry import _OPS, FIRST
from retinue.tasks.classification import Classification
from tests.models.test_backbones import build

RECIPE = {
    "loss": "ce", "bce_target_threshold": None, "augment": {"label_smoothing": 0.1}, "epochs": 1,
    "optimizer": {"name": "adamw", "lr": 1e-3, "lr_batch_size": 8, "weight_decay": 0.0},
    "schedule": {"kind": "cosine", "warmup_epochs": 0, "warmup_lr": 0.0, "min_lr": 0.0},
}  # fmt: skip
# A pyramid, one whose stages end with a norm, a plain net with a class token, and a pyramid with a class token
NETS = ("swin_nano", "transnext_micro", "deit_tiny", "pvt_tiny")


class Squared(nn.Module):
    """Op whose loss `square` is the mean square of its output."""

    takes_extra = True
    loss_weights = (("square", 0.5),)

    def __init__(self, dim, num_heads, *, place=FIRST):
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, extra=None, losses=None):
        out = self.proj(x)
        if losses is not None:
            losses.add("square", out.square().mean())
        return out if extra is None else (out, extra)


@pytest.fixture(params=NETS)
def net(request, monkeypatch):
    monkeypatch.setitem(_OPS, "squared", Squared)
    layout = {"mixers": [["squared", "full"]]}
    if request.param != "deit_tiny":
        layout = {"mixers": ["full", "squared", "full", ["squared", "full"]], "depths": (1, 2, 1, 2)}
    return build(request.param, num_classes=3, drop_path_rate=0.0, **layout)


def squares(net, x):
    """Return the loss of each op `Squared` in a forward pass without losses, computed from the ops' outputs."""
    found = []
    ops = [module for module in net.modules() if isinstance(module, Squared)]
    hooks = [
        op.register_forward_hook(
            lambda _, args, out: found.append((out[0] if isinstance(out, tuple) else out).square().mean())
        )
        for op in ops
    ]
    net(x)
    for hook in hooks:
        hook.remove()
    assert len(found) == len(ops) > 1
    return found


def test_losses_are_means_over_the_ops_and_leave_the_output_unchanged(net):
    x = torch.randn(2, 3, 64, 64)
    out, losses = net.forward_with_losses(x)
    assert torch.equal(out, net(x)) and list(losses) == ["square"] and loss_weights(net) == {"square": 0.5}
    assert torch.allclose(losses["square"], torch.stack(squares(net, x)).mean())


@pytest.mark.parametrize("way", ["checkpointing", "compilation", "both"])
def test_recomputation_and_compilation_change_no_loss_and_no_gradient(net, way):
    x = torch.randn(2, 3, 64, 64)

    def run(model):
        out, losses = model.forward_with_losses(x)
        total = out.square().sum() + losses["square"]
        return [losses["square"], *torch.autograd.grad(total, list(net.parameters()))]

    expected = run(net)
    if way != "compilation":
        net.set_grad_checkpointing()
    if way != "checkpointing":
        torch._dynamo.reset()
        net.compile(backend="eager")
    for a, b in zip(run(net), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    for a, b in zip(run(net), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_task_adds_losses_by_weight_logs_them_and_evaluates_without(net, monkeypatch):
    batch = {"image": torch.randn(2, 3, 64, 64), "label": torch.tensor([0, 2]), "index": torch.tensor([0, 1])}
    distillation = {"teacher": None}
    logits, losses = copy.deepcopy(net).forward_with_losses(batch["image"])
    plain = LabelSmoothingCrossEntropy(0.1)(logits, batch["label"])
    for changes, weight in (({}, 0.5), ({"square": 2.0}, 2.0)):
        task = Classification(net, RECIPE, num_classes=3, distillation=distillation, loss_weights=changes)
        loss = task.training_step(batch, 0)
        assert torch.allclose(loss, plain + weight * losses["square"])
        figures = task.running_figures()
        assert figures["train/square"] == pytest.approx(losses["square"].item(), rel=1e-5)
        assert figures["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
        with monkeypatch.context() as patch:
            patch.setattr(net, "forward_with_losses", None)
            task.validation_step(batch, 0)
    with pytest.raises(
        ValueError, match=r"no loss is called 'squares'[.] Did you mean 'square'[?] The net has: square"
    ):
        Classification(net, RECIPE, num_classes=3, distillation=distillation, loss_weights={"squares": 1.0})


def test_a_net_without_losses_refuses_a_weight():
    with pytest.raises(ValueError, match=r"no loss is called 'square'[.] The net has: none"):
        Classification(
            build("swin_nano"), RECIPE, num_classes=3, distillation={"teacher": None}, loss_weights={"square": 1.0}
        )
