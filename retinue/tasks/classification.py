"""Task of image classification."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from models.factory import create_model
from models.plain import PlainBackbone
from ops.losses import loss_weights
from retinue.evaluation.classification import Predictions, check_finite, summarize, topk_predictions
from retinue.evaluation.contributions import Contributions
from retinue.evaluation.plots import draw_probabilities, plot_confusion, plot_reliability
from retinue.evaluation.predictions import write_predictions_csv, write_probabilities
from retinue.tasks.base import Task
from retinue.tasks.class_weights import check_class_weights, class_weights, weighted_mean
from retinue.tasks.distillation import Teacher
from retinue.utils.suggestions import nearest

# Label of images that a loss leaves out.
IGNORED = -100


class Classification(Task):
    """Classification by cross-entropy or binary cross-entropy; the figures are top-1 and top-5 accuracy.

    Targets are labels or soft targets, which mixing and smoothing make. From a teacher a net with a distillation token
    learns by the scores of that token alone, other nets by their scores.

    Args:
        model: Net from images (B, C, H, W) to logits (B, num_classes).
        recipe: As in `Task`, with `loss` (ce or bce), `augment.label_smoothing` and `bce_target_threshold`.
        num_classes: Number of classes.
        distillation: `teacher` (a timm name, null for none), and the further arguments of
            `retinue.tasks.distillation.Teacher`.
        loss_weights: Weights of the net's auxiliary losses by name; by default those of the paper.
        kwargs: Further arguments of `Task`.

    Attributes:
        predictions: Predictions of all ranks for the test split, after a test.

    Raises:
        ValueError: `recipe.loss` is unknown, the net has no loss of a name in `loss_weights`, it has no tokens for
            token distillation, or an argument of `Task` or `Teacher` is wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Mapping,
        *,
        num_classes: int,
        distillation: Mapping,
        loss_weights: Mapping[str, float] | None = None,
        **kwargs,
    ):
        super().__init__(model, recipe, **kwargs)
        self.loss_weights = weights_of_losses(model, loss_weights or {})
        self.num_classes = num_classes
        self.teacher = Teacher(num_classes=num_classes, **distillation) if distillation["teacher"] else None
        if self.teacher is not None:
            if self.teacher.tokens and not isinstance(model, PlainBackbone):
                raise ValueError("task.distillation.tokens needs a ViT-shaped net of Retinue's, such as model=deit")
            if isinstance(model, PlainBackbone):
                model.set_distilled_training()
        if recipe["loss"] not in ("ce", "bce"):
            raise ValueError(f"recipe.loss must be ce or bce, not {recipe['loss']!r}")
        self.smoothing = recipe["augment"]["label_smoothing"]
        reduction = "none" if recipe.get("class_weights") else "mean"
        bce = BinaryCrossEntropy(self.smoothing, recipe["bce_target_threshold"], reduction=reduction)
        self.bce = bce if recipe["loss"] == "bce" else None
        # Weight of each class in the loss, (K,), once the training images are known; None if all are 1.
        self.class_weights: Tensor | None = None
        # Sums of this rank in the current validation: (loss, top-1 hits, top-5 hits, images).
        self._val_sums: Tensor | None = None
        # Predictions of this rank in the current test, by batch.
        self._rank_predictions: list[Predictions] = []
        self.predictions: Predictions | None = None

    @staticmethod
    def build_net(cfg: Any, datamodule: Any) -> nn.Module:
        check_class_weights(cfg.recipe.get("class_weights"), datamodule.class_names)
        return create_model(cfg.model, datamodule.num_classes, datamodule.in_chans, datamodule.image_size)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if weights := self.recipe.get("class_weights"):
            datamodule: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            labels = datamodule.images("train").labels
            self.class_weights = class_weights(weights, datamodule.class_names, labels).to(self.device)

    def test_figures(self, datamodule: Any) -> dict[str, Any]:
        assert self.predictions is not None
        return summarize(self.predictions, datamodule.class_names)

    def contributions(self, datamodule: Any) -> Contributions:
        assert self.predictions is not None
        names = datamodule.names("test")
        images = np.array([names[index] for index in self.predictions.index])
        top5 = (self.predictions.topk[:, :5] == self.predictions.label[:, None]).any(1)
        arrays = {
            "label": self.predictions.label,
            "top1": self.predictions.correct,
            "top5": top5,
            "loss": self.predictions.loss,
            "brier": self.predictions.brier,
        }
        return Contributions("classification", images, arrays)

    def write_report(self, folder: Path, datamodule: Any) -> None:
        """Write `predictions.csv`, `confusion.png` and `reliability.png`; with `predictions_folder` predictions."""
        assert self.predictions is not None
        names, classes = datamodule.names("test"), datamodule.class_names
        write_predictions_csv(folder / "predictions.csv", self.predictions, classes, names)
        plot_confusion(folder / "confusion.png", self.predictions, classes)
        plot_reliability(folder / "reliability.png", self.predictions)
        if self.predictions_folder:
            self.write_predictions(folder, datamodule)

    def write_predictions(self, folder: Path, datamodule: Any) -> None:
        """Write `probabilities.csv` and `probabilities.json`, the five most probable classes of each image."""
        assert self.predictions is not None
        check_finite(self.predictions)
        names = datamodule.names("test")
        write_probabilities(folder / "probabilities", self.predictions, datamodule.class_names, names)

    def describe_predictions(self, datamodule: Any) -> dict[int, str]:
        assert self.predictions is not None
        names, best = datamodule.class_names, self.predictions.topk[:, 0]
        rows = zip(self.predictions.index.tolist(), best, self.predictions.confidence, strict=True)
        return {index: f"{names[label]} {score:.3f}" for index, label, score in rows}

    def draw_prediction(self, path: Path, index: int, datamodule: Any) -> None:
        assert self.predictions is not None
        row, image = np.searchsorted(self.predictions.index, index), datamodule.images("test").image(index)
        names = [datamodule.class_names[label] for label in self.predictions.topk[row]]
        draw_probabilities(path, image, names, self.predictions.scores[row])

    def forward(self, image: Tensor) -> Any:
        return self.model(image)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the mean loss of a batch.

        Args:
            logits: (B, K).
            target: Labels (B,), which are smoothed here, or soft targets (B, K), which are taken as they are.
        """
        smoothing = self.smoothing if target.ndim == 1 else 0.0
        if self.class_weights is not None:
            losses = (
                F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none") if self.bce is None
                else self.bce(logits, target).mean(1)
            )  # fmt: skip
            return weighted_mean(losses, target, self.class_weights)
        if self.bce is not None:
            return self.bce(logits, target)
        return F.cross_entropy(logits, target, label_smoothing=smoothing)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        image, label, losses = batch["image"], batch["label"], {}
        weights, teacher_logits, tokens = self.loss_weights, None, None
        if self.teacher is not None:
            datamodule: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            teacher_logits, tokens = self.teacher.answer(image, datamodule.mean, datamodule.std)
            weights = {**weights, "tokens": self.teacher.tokens}
        if self.loss_weights or tokens is not None:
            model: Any = self.model
            logits, losses = model.forward_with_losses(image, tokens)
        else:
            logits = self(image)
        logits, distilled = logits if isinstance(logits, tuple) else (logits, logits)
        target = batch.get("target", label)
        loss = self.loss(logits, target)
        if self.teacher is not None and teacher_logits is not None:
            loss = self.teacher.blend(loss, distilled, teacher_logits)
        for name, value in losses.items():
            loss = loss + weights[name] * value
        hit = logits.argmax(1) == (target.argmax(1) if target.ndim == 2 else target)
        self.track(loss, len(label), top1=hit.float().mean(), **losses)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        # Images that pad the last batch of a rank have the index -1.
        # They are masked: selecting the others would wait for the GPU to count them.
        padding = batch["index"] < 0
        logits, label = self(batch["image"]).float(), batch["label"]
        # Number of classes that score higher than the true one.
        ranks = (logits > logits.gather(1, label[:, None])).sum(1)
        # Comparisons with NaN are false, so without this line scores that have no order would be right.
        wrong = padding | (logits.isnan() | logits.isposinf()).any(1)
        ranks = ranks.masked_fill(wrong, max(5, self.num_classes))
        loss = F.cross_entropy(logits, label.masked_fill(padding, IGNORED), reduction="sum", ignore_index=IGNORED)
        sums = torch.stack([loss, (ranks < 1).sum(), (ranks < 5).sum(), (~padding).sum()])
        self._val_sums = sums.double() if self._val_sums is None else self._val_sums + sums

    def on_validation_epoch_end(self) -> None:
        assert self._val_sums is not None
        loss, top1, top5, images = self.trainer.strategy.reduce(self._val_sums, reduce_op="sum").tolist()
        self._val_sums = None
        self.val_figures = {"val/loss": loss / images, "val/top1": top1 / images, "val/top5": top5 / images}
        # Callbacks that monitor a figure read it from Lightning's log.
        self.log_dict(self.val_figures, logger=False)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        subset = self.trainer.datamodule.class_subset  # pyright: ignore[reportAttributeAccessIssue]
        self._rank_predictions.append(topk_predictions(self(batch["image"]), batch["label"], batch["index"], subset))

    def on_test_epoch_end(self) -> None:
        own, self._rank_predictions = Predictions.concatenate(self._rank_predictions), []
        self.predictions = Predictions.concatenate(self.gather(own))

    # The labels of images without labels are placeholders, and `write_predictions` leaves them out.
    predict_step = test_step
    on_predict_epoch_end = on_test_epoch_end


def weights_of_losses(model: nn.Module, changes: Mapping[str, float]) -> dict[str, float]:
    """Return the weights of a net's auxiliary losses by name: those of the paper, with `changes`.

    Raises:
        ValueError: The net has no loss of a name in `changes`.
    """
    weights = loss_weights(model)
    for name in changes:
        if name not in weights:
            known = ", ".join(weights) if weights else "none"
            raise ValueError(
                f"task.loss_weights: no loss is called {name!r}.{nearest(name, weights)} The net has: {known}"
            )
    return {**weights, **changes}
