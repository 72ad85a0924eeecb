"""Scores that are not finite are never right, and a net that gives them is never the best one."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from retinue.runs.ema import EMA
from retinue.tasks.base import all_finite, state_of
from retinue.tasks.classification import Classification
from retinue.tasks.segmentation import Segmentation

RECIPE = {
    "loss": "ce", "bce_target_threshold": None, "augment": {"label_smoothing": 0.0}, "optimizer": {"name": "adamw"},
    "schedule": {"kind": "cosine"},
}  # fmt: skip


def validated(net: nn.Module, classes: int = 3):
    """Return the figures of a validation of four images."""
    task = Classification(net, RECIPE, num_classes=classes, distillation={"teacher": None}, channels_last=False)
    task.trainer = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value), barebones=True
    )
    task.log_dict = lambda *args, **kwargs: None  # pyright: ignore[reportAttributeAccessIssue]
    batch = {"image": torch.zeros(4, 1), "label": torch.tensor([0, 1, 2, 0]), "index": torch.arange(4)}
    task.validation_step(batch, 0)
    task.on_validation_epoch_end()
    return task.val_figures


class Scores(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, image):
        return self.rows


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_wrong(value):
    figures = validated(Scores([[value] * 3] * 4))
    assert figures["val/top1"] == figures["val/top5"] == 0
    figures = validated(Scores([[1.0, 0, 0], [value, 0, 0], [0, value, 1], [2.0, 1, 0]]))
    assert figures["val/top1"] == figures["val/top5"] == 0.5


def test_weights_buffers_and_their_average_are_looked_at():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert all_finite(state_of(net))
    running = net[1].running_var
    assert isinstance(running, torch.Tensor)
    running[0] = float("nan")
    assert not all_finite(state_of(net))
    average = EMA(0.9, False)
    average._averages = state_of(net)
    with pytest.raises(ValueError, match="the average of the weights is not finite"):
        average.check_finite()
    # The norm of many large values overflows, the values do not.
    assert all_finite([torch.full((1000,), 60000.0, dtype=torch.float16), torch.full((9,), 1e38)])


def test_a_net_whose_scores_are_nan_is_refused_and_never_the_best(cli, monkeypatch):
    from retinue.tasks import classification

    forward = classification.Classification.forward

    def nan_in_evaluation(self, image):
        scores = forward(self, image)
        return scores if self.training else scores * float("nan")

    monkeypatch.setattr(classification.Classification, "forward", nan_in_evaluation)
    outcome = cli.train("hydra.run.dir=run", "recipe.epochs=1", "trainer.limit_train_batches=2")
    assert "the scores of 357 of 357 images are not finite" in outcome.error
    assert not (cli.folder / "run/checkpoints/best.ckpt").exists()
    assert not (cli.folder / "run/result.json").exists()


def test_a_buffer_that_is_nan_ends_the_run_before_a_checkpoint(cli, monkeypatch):
    from retinue.tasks import classification

    step = classification.Classification.training_step

    def spoil(self, batch, batch_idx):
        for name, buffer in self.named_buffers():
            if name.endswith("running_mean"):
                buffer.fill_(float("nan"))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(classification.Classification, "training_step", spoil)
    outcome = cli.train("hydra.run.dir=run", "model=timm", "model.name=resnet10t", "recipe.epochs=1",
                        "trainer.limit_train_batches=2")  # fmt: skip
    assert "not finite" in outcome.error
    assert not list(cli.folder.glob("run/checkpoints/*.ckpt"))


def test_segmentation_scores_that_are_nan_are_refused():
    batch = {"index": torch.arange(2), "image": torch.zeros(2, 3, 4, 4), "mask": torch.zeros(2, 4, 4)}
    task: Any = SimpleNamespace(model=SimpleNamespace(logits=None))
    scores = torch.zeros(3, 4, 4)
    for inference in (lambda *arguments: scores, lambda *arguments: scores / 0):
        predictions = Segmentation.predictions(task, batch, cast(Any, inference))
        if inference(None).isnan().any():
            with pytest.raises(ValueError, match="the scores of image 0 are not finite"):
                list(predictions)
        else:
            assert len(list(predictions)) == 2
