"""Image classification."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from models.factory import create_model
from retinue.evaluation.classification import Predictions, summarize, topk_predictions
from retinue.evaluation.plots import plot_confusion, plot_reliability
from retinue.evaluation.predictions import write_predictions_csv
from retinue.tasks.base import Task
from retinue.tasks.distillation import Teacher


class Classification(Task):
    """Cross-entropy or binary cross-entropy on labels or soft targets (mixed, smoothed); top-1 and top-5.

    Args:
        distillation: `teacher` (a timm name, null for none), `weights`, `mode`, `alpha`, `temperature`.
    """

    def __init__(self, model: nn.Module, recipe: Mapping, *, num_classes: int, distillation: Mapping, **kwargs):
        super().__init__(model, recipe, **kwargs)
        self.num_classes = num_classes
        self.teacher = Teacher(num_classes=num_classes, **distillation) if distillation["teacher"] else None
        if recipe["loss"] not in ("ce", "bce"):
            raise ValueError(f"recipe.loss must be ce or bce, not {recipe['loss']!r}")
        self.smoothing = recipe["augment"]["label_smoothing"]
        bce = BinaryCrossEntropy(smoothing=self.smoothing, target_threshold=recipe["bce_target_threshold"])
        self.bce = bce if recipe["loss"] == "bce" else None
        self._val: Tensor | None = None
        self._predictions: list[Predictions] = []
        self.predictions: Predictions | None = None  # of all ranks, after a test

    @staticmethod
    def build_net(cfg: Any, datamodule: Any) -> nn.Module:
        return create_model(cfg.model, datamodule.num_classes, datamodule.in_chans, datamodule.image_size)

    def test_figures(self, datamodule: Any) -> dict[str, Any]:
        assert self.predictions is not None
        return summarize(self.predictions, datamodule.class_names)

    def write_report(self, folder: Path, datamodule: Any) -> None:
        """`predictions.csv`, `confusion.png`, `reliability.png`."""
        assert self.predictions is not None
        names, classes = datamodule.names("test"), datamodule.class_names
        write_predictions_csv(folder / "predictions.csv", self.predictions, classes, names)
        plot_confusion(folder / "confusion.png", self.predictions, classes)
        plot_reliability(folder / "reliability.png", self.predictions)

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean loss of `logits` (B, K) for labels (B,), to be smoothed, or targets (B, K) that are mixed and smooth."""
        if self.bce is not None:
            return self.bce(logits, target)
        return F.cross_entropy(logits, target, label_smoothing=self.smoothing if target.ndim == 1 else 0.0)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits, label = self(batch["image"]), batch["label"]
        target = batch.get("target", label)
        loss = self.loss(logits, target)
        if self.teacher is not None:
            loss = self.teacher.blend(loss, logits, batch["image"])
        hit = logits.argmax(1) == (target.argmax(1) if target.ndim == 2 else target)
        self.track(loss, len(label), top1=hit.float().mean())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        seen = batch["index"] >= 0
        logits, label = self(batch["image"])[seen].float(), batch["label"][seen]
        ranks = (logits > logits.gather(1, label[:, None])).sum(1)  # classes that score higher than the true one
        sums = torch.stack(
            [F.cross_entropy(logits, label, reduction="sum"), (ranks < 1).sum(), (ranks < 5).sum(), seen.sum()]
        )
        self._val = sums.double() if self._val is None else self._val + sums

    def on_validation_epoch_end(self) -> None:
        assert self._val is not None
        loss, top1, top5, images = self.trainer.strategy.reduce(self._val, reduce_op="sum").tolist()
        self._val = None
        self.val_figures = {"val/loss": loss / images, "val/top1": top1 / images, "val/top5": top5 / images}
        self.log_dict(self.val_figures, logger=False)  # for callbacks that monitor

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        subset = self.trainer.datamodule.class_subset  # pyright: ignore[reportAttributeAccessIssue]
        self._predictions.append(topk_predictions(self(batch["image"]), batch["label"], batch["index"], subset))

    def on_test_epoch_end(self) -> None:
        predictions, self._predictions = Predictions.concatenate(self._predictions), []
        if self.trainer.world_size > 1:
            parts: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, predictions)
            predictions = Predictions.concatenate(parts)
        self.predictions = predictions
