"""Task of multi-label classification: an image may have any number of classes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from models.factory import create_model
from retinue.evaluation.contributions import Contributions
from retinue.evaluation.multi_label import FIGURES, Ranking, Scores, summarize, write_classes_csv, write_scores_csv
from retinue.evaluation.plots import draw_probabilities
from retinue.tasks.base import Task
from retinue.tasks.classification import weights_of_losses

# Largest number of classes in the picture of a prediction.
MAX_DRAWN = 5
# Smallest probability in a logarithm.
EPS = 1e-8


class MultiLabel(Task):
    """Classification by one binary decision for each class; the figures are average precision and F1.

    Args:
        model: Net from images (B, C, H, W) to logits (B, K).
        recipe: As in `Task`, with `loss` (bce or asl), `augment.label_smoothing` s, which makes a target y
            y (1 - s) + s / 2, and `bce_target_threshold`, above which a mixed target counts as 1.
        num_classes: Number of classes K.
        asl: Arguments of `asymmetric_loss`.
        loss_weights: Weights of the net's auxiliary losses by name; by default those of the paper.
        kwargs: Further arguments of `Task`.

    Attributes:
        scores: Scores of all ranks for the test split, after a test.

    Raises:
        ValueError: `recipe.loss` is unknown, the net has no loss of a name in `loss_weights`, or an argument of `Task`
            is wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Mapping,
        *,
        num_classes: int,
        asl: Mapping[str, float],
        loss_weights: Mapping[str, float] | None = None,
        **kwargs,
    ):
        super().__init__(model, recipe, **kwargs)
        if recipe["loss"] not in ("bce", "asl"):
            raise ValueError(f"recipe.loss must be bce or asl for task=multi_label, not {recipe['loss']!r}")
        self.num_classes, self.asl = num_classes, dict(asl)
        self.loss_weights = weights_of_losses(model, loss_weights or {})
        self._rank_scores: list[Scores] = []
        self.scores: Scores | None = None
        # Entry `per_class` of the test's figures.
        self.per_class: dict[str, Any] | None = None

    @staticmethod
    def build_net(cfg: Any, datamodule: Any) -> nn.Module:
        return create_model(cfg.model, datamodule.num_classes, datamodule.in_chans, datamodule.image_size)

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the mean loss of a batch.

        Args:
            logits: (B, K).
            target: (B, K), 0 to 1.
        """
        target, threshold = target.float(), self.recipe["bce_target_threshold"]
        if threshold is not None:
            target = (target > threshold).float()
        smoothing = self.recipe["augment"]["label_smoothing"]
        target = target * (1 - smoothing) + smoothing / 2
        if self.recipe["loss"] == "asl":
            return asymmetric_loss(logits, target, **self.asl).mean()
        return F.binary_cross_entropy_with_logits(logits.float(), target)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        image, losses = batch["image"], {}
        if self.loss_weights:
            model: Any = self.model
            logits, losses = model.forward_with_losses(image)
        else:
            logits = self(image)
        loss = self.loss(logits, batch.get("target", batch["label"]))
        for name, value in losses.items():
            loss = loss + self.loss_weights[name] * value
        self.track(loss, len(image), **losses)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits, label = self(batch["image"]).float(), batch["label"]
        loss = F.binary_cross_entropy_with_logits(logits, label.float(), reduction="none").mean(1)
        arrays = (batch["index"], label > 0, logits.sigmoid(), loss.double())
        self._rank_scores.append(Scores(*(array.cpu().numpy() for array in arrays)))

    test_step = predict_step = validation_step

    def on_validation_epoch_end(self) -> None:
        scores = self._gather_scores()
        # Scores that are not a number have no order: they rank last.
        ranking = Ranking(scores.label, np.nan_to_num(scores.score), scores.loss)
        figures = ranking.figures(np.ones(len(scores.index)))
        # A figure that no class defines is the worst one, so that callbacks can compare it.
        undefined = np.isnan(figures) & (np.array(FIGURES) != "loss")
        figures = dict(zip(FIGURES, np.where(undefined, 0, figures).tolist(), strict=True))
        self.val_figures = {f"val/{name}": figures[name] for name in ("loss", *FIGURES[:-1])}
        # Callbacks that monitor a figure read it from Lightning's log.
        self.log_dict(self.val_figures, logger=False)

    def on_test_epoch_end(self) -> None:
        self.scores = self._gather_scores()

    # The labels of images without labels are placeholders, and `write_predictions` leaves them out.
    on_predict_epoch_end = on_test_epoch_end

    def _gather_scores(self) -> Scores:
        """Return the scores of all ranks since the last call."""
        own, self._rank_scores = Scores.concatenate(self._rank_scores), []
        return Scores.concatenate(self.gather(own))

    def test_figures(self, datamodule: Any) -> dict[str, Any]:
        assert self.scores is not None
        figures = summarize(self.scores, datamodule.class_names)
        self.per_class = figures["per_class"]
        return figures

    def contributions(self, datamodule: Any) -> Contributions:
        assert self.scores is not None
        names = datamodule.names("test")
        images = np.array([names[index] for index in self.scores.index])
        arrays = {"label": self.scores.label, "score": self.scores.score, "loss": self.scores.loss}
        return Contributions("multi_label", images, arrays)

    def write_report(self, folder: Path, datamodule: Any) -> None:
        """Write `predictions.csv` and `classes.csv`; with `predictions_folder` predictions.

        `test_figures` has been called.
        """
        assert self.scores is not None and self.per_class is not None
        names, classes = datamodule.names("test"), datamodule.class_names
        write_scores_csv(folder / "predictions.csv", self.scores, classes, names, with_truth=True)
        write_classes_csv(folder / "classes.csv", self.per_class)
        if self.predictions_folder:
            self.write_predictions(folder, datamodule)

    def write_predictions(self, folder: Path, datamodule: Any) -> None:
        """Write `probabilities.csv`, the predicted classes and the probability of each class."""
        assert self.scores is not None
        self.scores.check_finite()
        names, classes = datamodule.names("test"), datamodule.class_names
        write_scores_csv(folder / "probabilities.csv", self.scores, classes, names, with_truth=False)

    def describe_predictions(self, datamodule: Any) -> dict[int, str]:
        assert self.scores is not None
        names, described = np.array(datamodule.class_names, object), {}
        for index, score, predicted in zip(self.scores.index, self.scores.score, self.scores.predicted, strict=True):
            order = np.argsort(-score, kind="stable")[: predicted.sum()]
            described[int(index)] = ", ".join(f"{names[k]} {score[k]:.3f}" for k in order) or "no class"
        return described

    def draw_prediction(self, path: Path, index: int, datamodule: Any) -> None:
        assert self.scores is not None
        score = self.scores.score[np.searchsorted(self.scores.index, index)]
        best = np.argsort(-score, kind="stable")[:MAX_DRAWN]
        image = datamodule.images("test").image(index)
        draw_probabilities(path, image, [datamodule.class_names[k] for k in best], score[best])


def asymmetric_loss(
    logits: Tensor, target: Tensor, gamma_positive: float = 0.0, gamma_negative: float = 4.0, margin: float = 0.05
) -> Tensor:
    """Compute the asymmetric loss of each image, the sum over the classes (ASL: Ridnik et al., arXiv:2009.14119).

    With p the probability of a class and q = max(p - margin, 0), the loss is -(1 - p)^gamma_positive log(p) for a
    positive and -q^gamma_negative log(1 - q) for a negative; a target between 0 and 1 takes its share of both.

    Args:
        logits: (B, K).
        target: (B, K), 0 to 1.
        gamma_positive: Focusing exponent of positives.
        gamma_negative: Focusing exponent of negatives.
        margin: Probability up to which a negative has no loss.

    Returns:
        float32 (B,).
    """
    logits = logits.float()
    p = logits.sigmoid()
    q = (p - margin).clamp(min=0)
    positive = (1 - p) ** gamma_positive * F.logsigmoid(logits)
    negative = q**gamma_negative * (1 - q).clamp(min=EPS).log()
    return -(target * positive + (1 - target) * negative).sum(1)
