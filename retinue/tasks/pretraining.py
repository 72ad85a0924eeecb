"""Task of self-supervised pretraining: a method trains a backbone on images without their labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.optim import Optimizer

from datamodules.pretraining import PretrainingData
from models.classifier_rows import ClassifierRows
from models.complexity import complexity
from models.factory import create_model
from models.weights import load_weights
from retinue.evaluation.classification import wilson
from retinue.evaluation.contributions import Contributions
from retinue.evaluation.representation import rankme
from retinue.probing.online import knn_top1, probe_top1
from retinue.tasks.base import Task
from retinue.tasks.methods.method import Method
from retinue.tasks.methods.unused import unused_parameters

# Keys of `conf/method/*.yaml` that are no arguments of the method's class
LABELS = ("name", "task", "recipe", "views")


class Pretraining(Task):
    """Self-supervised pretraining by a method of `retinue.tasks.methods`.

    After each epoch the held-out images give the method's loss and, from the backbone's features, RankMe; if the data
    have labels, also the accuracy of nearest neighbours and of a linear probe, whose bank are training images. Labels
    serve for nothing else.

    Args:
        model: The method, with the backbone.
        recipe: As in `Task`.
        num_classes: Number of classes; 0 for images without labels.
        bank: Largest number of training images in the bank of neighbours and probe; 0 computes neither.
        kwargs: Further arguments of `Task`.
    """

    model: Method  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, model: nn.Module, recipe: Mapping, *, num_classes: int, bank: int, **kwargs):
        super().__init__(model, recipe, **kwargs)
        self.bank = bank if num_classes else 0
        self._total_steps = 1
        # Sums (loss, images), and features, labels and indices by batch, of this rank in the current evaluation
        self._val_sums = torch.zeros(2, dtype=torch.float64)
        self._rank_features: list[tuple[np.ndarray, ...]] = []
        # Figures, positions of the images, and hits by figure, of the last test
        self.figures: dict[str, float] = {}
        self.index = np.zeros(0, np.int64)
        self.hits: dict[str, np.ndarray] = {}

    @staticmethod
    def build_net(cfg: Any, datamodule: Any) -> nn.Module:
        backbone = create_model(cfg.model, 0, datamodule.in_chans, datamodule.image_size)
        size = datamodule.image_size
        section: Any = OmegaConf.to_container(cfg.method, resolve=True)
        method = instantiate(
            {key: value for key, value in section.items() if key not in LABELS},
            backbone=backbone,
            image_size=(size, size) if isinstance(size, int) else size,
            views=datamodule.train_transform.shapes,
            in_chans=datamodule.in_chans,
            _convert_="all",
        )
        try:
            unused = unused_parameters(method, datamodule.in_chans)
        except (RuntimeError, AssertionError) as error:
            sizes = " and ".join(sorted({f"{height} x {width}" for (height, width), *_ in method.views}))
            reason = str(error).splitlines()[0]
            raise ValueError(f"{type(backbone).__name__} takes no views of {sizes} pixels: {reason}") from error
        for name in unused:
            method.get_parameter(name).requires_grad = False
        return method

    @staticmethod
    def data_arguments(cfg: Any) -> dict[str, Any]:
        # A folder of images may lack class folders.
        any_folder = {"_target_": "datamodules.any_folder.AnyFolder"}
        return any_folder if cfg.data._target_ == "datamodules.image_folder.ImageFolder" else {}

    @staticmethod
    def adapt_data(cfg: Any, datamodule: Any) -> Any:
        views, augment = (
            OmegaConf.to_container(section, resolve=True) for section in (cfg.method.views, cfg.recipe.augment)
        )
        return PretrainingData(datamodule, views, augment, get_class(cfg.method._target_).mask_patch)  # pyright: ignore[reportArgumentType]

    def start_from(self, weights: str, drop_classifier: bool, classifier_rows: ClassifierRows | None = None) -> None:
        load_weights(self.model.backbone, weights, drop_classifier=True)
        for name in self.model.copies:
            self.model.get_submodule(name).load_state_dict(self.model.backbone.state_dict())

    def complexity(self, datamodule: Any) -> tuple[int, int]:
        """Return the backbone's number of parameters and multiply-accumulates."""
        return complexity(self.model.backbone, datamodule.image_size, datamodule.in_chans)

    @property
    def compiled_part(self) -> tuple[nn.Module, bool]:
        one_size = len({view.size for view in self.model.views}) <= 1
        return self.model.get_submodule(self.model.trained), one_size

    def configure_model(self) -> None:
        super().configure_model()
        # FSDP gathers the weights for `forward` and for registered methods only.
        if isinstance(self.model, FSDPModule):
            register_fsdp_forward_method(self.model, "features")

    def configure_optimizers(self) -> Any:
        self._total_steps = self.steps_per_epoch() * (self.trainer.max_epochs or 0)
        return super().configure_optimizers()

    @property
    def progress(self) -> float:
        """Share of the training's optimiser steps that are done; 1 outside of training."""
        return (
            min(1.0, self.global_step / self._total_steps) if self.trainer.training or self.trainer.validating else 1.0
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.model(batch, self.progress)
        self.track(losses["loss"], len(batch["index"]), **{k: v for k, v in losses.items() if k != "loss"})
        return losses["loss"]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.model.before_step(optimizer, self.progress)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # A checkpoint is written before `on_train_batch_end` of the task. The step is not counted yet.
        self.model.after_step(min(1.0, (self.global_step + 1) / self._total_steps))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        # Images that pad the last batch of a rank have the index -1.
        kept = batch["index"] >= 0
        count = int(kept.sum())
        if not count:
            return
        if count < len(kept):
            batch = {
                key: [_rows(view, kept) for view in value] if key == "views" else value[kept]
                for key, value in batch.items()
            }
        loss = self.model(batch, self.progress)["loss"]
        self._val_sums += torch.tensor([float(loss) * count, count], dtype=torch.float64)
        features = self.model.features(batch["image"]).float().cpu().numpy()
        self._rank_features.append((features, batch["label"].cpu().numpy(), batch["index"].cpu().numpy()))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        figures, _, _ = self._evaluate()
        self.val_figures = {f"val/{name}": value for name, value in figures.items()}
        # Callbacks that monitor a figure read it from Lightning's log.
        self.log_dict(self.val_figures, logger=False)

    def on_test_epoch_end(self) -> None:
        self.figures, self.index, self.hits = self._evaluate()

    def _evaluate(self) -> tuple[dict[str, float], np.ndarray, dict[str, np.ndarray]]:
        """Return the figures by name, the positions of the images, and the hits of each image by figure."""
        loss, images = torch.stack(self.gather(self._val_sums)).sum(0).tolist()
        features, labels, index = self._gather_features(self._rank_features)
        self._val_sums, self._rank_features = torch.zeros(2, dtype=torch.float64), []
        figures = {"loss": loss / images, "rankme": rankme(features)}
        hits: dict[str, np.ndarray] = {}
        if self.bank:
            bank, bank_labels, _ = self._gather_features(self._bank_features())
            known, classes, unknown = (
                torch.from_numpy(array).to(self.device) for array in (bank, bank_labels, features)
            )
            for name, predict in (("knn_top1", knn_top1), ("probe_top1", probe_top1)):
                hits[name] = predict(known, classes, unknown).numpy() == labels
                figures[name] = float(hits[name].mean())
        return figures, index, hits

    def _gather_features(self, batches: list[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
        """Return the features (N, D), labels (N,) and indices (N,) of all ranks in the order of the indices."""
        parts = [part for part in self.gather(batches) for part in part]
        features, labels, index = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = index.argsort()
        return [features[order], labels[order], index[order]]

    def _bank_features(self) -> list[tuple[np.ndarray, ...]]:
        """Return the features of this rank's images of the bank."""
        datamodule: PretrainingData = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        batches = []
        for batch in datamodule.bank_dataloader(self.bank):
            batch = self.trainer.strategy.batch_to_device(batch)
            kept = (batch["index"] >= 0).cpu().numpy()
            arrays = (self.model.features(batch["image"]).float(), batch["label"], batch["index"])
            batches.append(tuple(array.cpu().numpy()[kept] for array in arrays))
        return batches

    def test_figures(self, datamodule: Any) -> dict[str, Any]:
        figures: dict[str, Any] = dict(self.figures)
        for name, hits in self.hits.items():
            figures[f"{name}_ci95"] = wilson(float(hits.mean()), len(hits)).tolist()
        return figures | {"n": len(self.index)}

    def contributions(self, datamodule: Any) -> Contributions | None:
        """Return whether each image is right by its neighbours and by the probe; None without labels."""
        if not self.hits:
            return None
        names = datamodule.names("test")
        return Contributions("pretraining", np.array([names[index] for index in self.index]), self.hits)

    def write_report(self, folder: Path, datamodule: Any) -> None:
        """Write nothing: the figures of `result.json` are the report."""


def _rows(view: dict[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    return {key: value[kept] for key, value in view.items()}
