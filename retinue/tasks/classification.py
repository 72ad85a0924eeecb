"""Task of image classification."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from models.factory import create_model
from models.plain import PlainBackbone
from ops.losses import Losses, loss_weights
from retinue.evaluation.calibration import calibrated_figures
from retinue.evaluation.classification import Predictions, check_finite, summarize, topk_predictions
from retinue.evaluation.contributions import Contributions
from retinue.evaluation.plots import draw_probabilities, plot_confusion, plot_reliability, plot_risk_coverage
from retinue.evaluation.predictions import write_predictions_csv, write_probabilities
from retinue.tasks.attention_labels import attended_share, attention_targets, check_attention
from retinue.tasks.base import Task
from retinue.tasks.class_weights import check_class_weights, class_weights, weighted_mean
from retinue.tasks.consistency import jensen_shannon
from retinue.tasks.distillation import Teacher, map_levels
from retinue.tasks.map_distillation import MapDistillation
from retinue.tasks.margin import MarginLoss, check_margin_loss, register_parts, run_with_features
from retinue.tasks.token_labels import TEACHER, TokenLabels, token_grid
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
        distillation: `teacher` (a timm name, null for none), `maps` (arguments of
            `retinue.tasks.map_distillation.MapDistillation`, of which `loss` may be null), and the further arguments of
            `retinue.tasks.distillation.Teacher`.
        loss_weights: Weights of the net's auxiliary losses by name; by default those of the paper.
        mixed_labels: "transmix" or "mixpro" labels mixed images by the class token's attention
            (`retinue.tasks.attention_labels`), None by area.
        token_labels: `source` (null for none), and the further arguments of `retinue.tasks.token_labels.TokenLabels`.
        margin_loss: Share of MultiGrain's margin loss (`retinue.tasks.margin`) in the loss; None for none.
        kwargs: Further arguments of `Task`.

    Attributes:
        predictions: Predictions of all ranks for the test split, after a test.
        temperature: Number that the logits of a test are divided by for `calibrated`; None has no such predictions.
        calibrated: Predictions as `predictions`, from the divided logits.

    Raises:
        ValueError: `recipe.loss` is unknown, the net has no loss of a name in `loss_weights`, it lacks what
            `distillation`, `mixed_labels` or `token_labels` needs, or an argument of `Task` or `Teacher` is wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Mapping,
        *,
        num_classes: int,
        distillation: Mapping,
        loss_weights: Mapping[str, float] | None = None,
        mixed_labels: str | None = None,
        token_labels: Mapping | None = None,
        margin_loss: float | None = None,
        **kwargs,
    ):
        super().__init__(model, recipe, **kwargs)
        self.loss_weights = weights_of_losses(model, loss_weights or {})
        self.num_classes = num_classes
        self.mixed_labels = mixed_labels
        settings = {key: value for key, value in distillation.items() if key != "maps"}
        self.teacher = Teacher(num_classes=num_classes, **settings) if distillation["teacher"] else None
        maps = distillation.get("maps")
        # Arguments of the loss between maps, or None without such a loss.
        self.map_settings = maps if self.teacher is not None and maps and maps["loss"] else None
        if self.teacher is not None:
            if self.teacher.tokens and not isinstance(model, PlainBackbone):
                raise ValueError("task.distillation.tokens needs a ViT-shaped net of Retinue's, such as model=deit")
            if isinstance(model, PlainBackbone):
                model.set_distilled_training()
        if recipe["loss"] not in ("ce", "bce"):
            raise ValueError(f"recipe.loss must be ce or bce, not {recipe['loss']!r}")
        self.smoothing = recipe["augment"]["label_smoothing"]
        self.token_labels = None
        if token_labels is not None and token_labels["source"] is not None:
            self.token_labels = TokenLabels(model, num_classes=num_classes, smoothing=self.smoothing, **token_labels)
            if self.token_labels.from_teacher and self.teacher is None:
                raise ValueError("task.token_labels.source=teacher needs task.distillation.teacher")
        self.jsd = recipe["augment"].get("jsd") or 0.0
        if mixed_labels is not None:
            check_attention(model, mixed_labels, recipe["augment"])
        self.margin_share = margin_loss or 0.0
        self._refuse_combinations()
        if hasattr(model, "set_branch_training"):
            model.set_branch_training()  # pyright: ignore[reportCallIssue]
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
        self.temperature: float | None = None
        self._rank_calibrated: list[Predictions] = []
        self.calibrated: Predictions | None = None

    @staticmethod
    def build_net(cfg: Any, datamodule: Any) -> nn.Module:
        if weights := cfg.recipe.get("class_weights"):
            check_class_weights(weights, datamodule.class_names)
        return create_model(cfg.model, datamodule.num_classes, datamodule.in_chans, datamodule.image_size)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if weights := self.recipe.get("class_weights"):
            datamodule: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            labels = datamodule.images("train").labels
            self.class_weights = class_weights(weights, datamodule.class_names, labels).to(self.device)

    def prepare_training(self, datamodule: Any) -> None:
        if self.margin_share:
            self.margin = MarginLoss(self.recipe["augment"]["repeats"])
        if self.map_settings is None:
            return
        assert self.teacher is not None
        size: Any = to_2tuple(datamodule.image_size)
        image = torch.randn(1, datamodule.in_chans, *size, generator=torch.Generator().manual_seed(0))
        own = map_levels(self.model, image, "student")
        seen = self.teacher.see(image, datamodule.mean, datamodule.std)
        others = map_levels(self.teacher.net, seen, "teacher")
        self.map_distillation = MapDistillation(own, others, **self.map_settings)

    def configure_model(self) -> None:
        super().configure_model()
        if self.margin is not None:
            register_parts(self.model)

    @staticmethod
    def data_arguments(cfg: Any) -> dict[str, Any]:
        source = (cfg.task.get("token_labels") or {}).get("source")
        return {} if source in (None, TEACHER) else {"token_maps": source}

    def test_figures(self, datamodule: Any) -> dict[str, Any]:
        assert self.predictions is not None
        figures = summarize(self.predictions, datamodule.class_names)
        if self.calibrated is not None and self.temperature is not None:
            figures |= calibrated_figures(self.calibrated, datamodule.class_names, self.temperature)
        return figures

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
        """Write `predictions.csv`, `confusion.png`, `reliability.png` and `risk_coverage.png`.

        With a temperature there is `reliability_calibrated.png`, and with `predictions_folder` there are predictions.
        """
        assert self.predictions is not None
        names, classes = datamodule.names("test"), datamodule.class_names
        write_predictions_csv(folder / "predictions.csv", self.predictions, classes, names)
        plot_confusion(folder / "confusion.png", self.predictions, classes)
        plot_reliability(folder / "reliability.png", self.predictions)
        curves = {"test": self.predictions}
        if self.calibrated is not None:
            plot_reliability(folder / "reliability_calibrated.png", self.calibrated)
            curves = {"before calibration": self.predictions, "after calibration": self.calibrated}
        plot_risk_coverage(folder / "risk_coverage.png", curves)
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

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        image, label, target = batch["image"], batch["label"], batch.get("target", batch["label"])
        losses, weights, teacher_logits = Losses(), dict(self.loss_weights), None
        losses.wants_attention = self.mixed_labels is not None and "mix" in batch
        teacher_scores, teacher_maps = None, ()
        if self.teacher is not None:
            datamodule: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            dense = self.token_labels is not None and self.token_labels.from_teacher
            grid = token_grid(self.model, image) if dense else None
            indices = self.map_distillation.teacher_indices if self.map_distillation is not None else ()
            answer = self.teacher.answer_densely(image, datamodule.mean, datamodule.std, grid, indices)
            teacher_logits, losses.target, teacher_scores, teacher_maps = answer
            weights["tokens"] = self.teacher.tokens
        if self.token_labels is not None:
            losses.token_labels, image_label = self.token_labels.targets(batch, teacher_scores)
            target = target if image_label is None else image_label
            weights["token_labels"] = self.token_labels.weight
        views = batch.get("altered")
        if self.map_distillation is not None:
            logits, figures = self._run_with_maps(image, teacher_maps)
            weights["maps"] = self.map_distillation.weight
        elif self.margin is not None:
            logits, features = run_with_features(self.model, image)
            seed = self.trainer.datamodule.seed << 32 | self.global_step  # pyright: ignore[reportAttributeAccessIssue]
            figures, weights["margin"] = {"margin": self.margin(features, batch["index"], seed)}, self.margin_share
        else:
            logits, figures = self._run(image if views is None else torch.cat([image, views]), losses)
        # Scores of a net's branches, (branches, B, K)
        branches = logits if isinstance(logits, Tensor) and logits.ndim == 3 else None
        if branches is not None:
            logits = branches[0]
        if views is not None:
            figures["jsd"] = jensen_shannon(logits, len(logits) // len(image))
            weights["jsd"], logits = self.jsd, logits[: len(image)]
        logits, distilled = logits if isinstance(logits, tuple) else (logits, logits)
        if losses.wants_attention:
            assert losses.attention is not None
            share = attended_share(batch["mix"], losses.attention, token_grid(self.model, image))
            target = attention_targets(
                str(self.mixed_labels), batch["mix"], label, target, logits, share, self.smoothing
            )
        loss = self.loss(logits, target) if branches is None else self._loss_of_branches(branches, target)
        if self.teacher is not None and teacher_logits is not None:
            loss = self.teacher.blend(loss, distilled, teacher_logits)
        loss = (1 - self.margin_share) * loss if self.margin is not None else loss
        for name, value in figures.items():
            loss = loss + weights[name] * value
        hit = logits.argmax(1) == (target.argmax(1) if target.ndim == 2 else target)
        self.track(loss, len(label), top1=hit.float().mean(), **figures)
        return loss

    def _refuse_combinations(self) -> None:
        """Raise a ValueError for choices that exclude each other."""
        branches = hasattr(self.model, "set_branch_training")
        for key, given in (
            ("task.distillation", self.teacher is not None),
            ("task.token_labels", self.token_labels is not None),
            ("a net of several branches", branches),
        ):
            if self.jsd and given:
                raise ValueError(
                    f"recipe.augment.jsd has views of the images that {key} cannot use: recipe.augment.jsd=null"
                )
        tokens = self.teacher is not None and self.teacher.tokens > 0
        for key, given in (("task.mixed_labels", self.mixed_labels), ("task.distillation.tokens", tokens)):
            if branches and given:
                raise ValueError(f"{key} is for nets of one branch, such as model=deit")
        for key, given in (
            ("task.mixed_labels", self.mixed_labels is not None),
            ("task.token_labels", self.token_labels is not None),
            ("task.distillation.tokens", tokens),
            ("a net with auxiliary losses", bool(self.loss_weights)),
            ("a net of several branches", branches),
        ):
            for other, chosen in (("distillation.maps", self.map_settings), ("margin_loss", self.margin_share)):
                if chosen and given:
                    raise ValueError(f"task.{other} cannot be combined with {key}")
        if self.margin_share:
            check_margin_loss(self.recipe["augment"], maps=self.map_settings is not None)
        if self.mixed_labels and self.token_labels is not None and self.token_labels.image_label == "maps":
            raise ValueError("task.mixed_labels labels the images: it needs task.token_labels.image_label=truth")

    def _run(self, image: Tensor, losses: Losses) -> tuple[Any, dict[str, Tensor]]:
        """Return the net's scores, and its auxiliary losses if it has any or if `losses` asks for something."""
        asked = losses.wants_attention or losses.target is not None or losses.token_labels is not None
        if not (self.loss_weights or asked):
            return self(image), {}
        model: Any = self.model
        return model.forward_with_losses(image, losses=losses)

    def _run_with_maps(self, image: Tensor, teacher_maps: Sequence[Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Return the net's scores, and the distance `maps` of its maps from those of the teacher."""
        model: Any = self.model
        assert self.map_distillation is not None
        features, maps = model.forward_intermediates(image, indices=self.map_distillation.student_indices)
        return model.forward_head(features), {"maps": self.map_distillation(maps, teacher_maps)}

    def _loss_of_branches(self, scores: Tensor, target: Tensor) -> Tensor:
        """Return the loss of scores (branches, B, K) as the net weighs it."""
        model: Any = self.model
        return model.weigh(torch.stack([self.loss(branch, target) for branch in scores]))

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
        logits, label, index = self(batch["image"]), batch["label"], batch["index"]
        self._rank_predictions.append(topk_predictions(logits, label, index, subset))
        if self.temperature is not None:
            divided = logits.float() / self.temperature
            self._rank_calibrated.append(topk_predictions(divided, label, index, subset))

    def on_test_epoch_end(self) -> None:
        own, self._rank_predictions = Predictions.concatenate(self._rank_predictions), []
        self.predictions = Predictions.concatenate(self.gather(own))
        if self.temperature is not None:
            own, self._rank_calibrated = Predictions.concatenate(self._rank_calibrated), []
            self.calibrated = Predictions.concatenate(self.gather(own))

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
