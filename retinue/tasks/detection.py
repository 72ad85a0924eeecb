"""Task of object detection and instance segmentation."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.complexity import complexity
from models.openmmlab.build import Detector, build_detector
from models.openmmlab.config import learns_masks
from retinue.evaluation.detection import (
    Accuracy,
    ImageDetections,
    coco_results,
    evaluate,
    merge,
    per_class,
    write_results,
)
from retinue.evaluation.detection_plots import plot_class_ap, plot_detections, plot_precision_recall
from retinue.evaluation.lvis import evaluate_federated
from retinue.tasks.dense_prediction import DensePredictionTask
from retinue.utils.arithmetic import round_up
from retinue.utils.files import write_text

# Figures of a validation; a test reports all twelve of COCO's.
VALIDATION_FIGURES = ("ap", "ap50", "ap75")


class Detection(DensePredictionTask):
    """Detection by the detector's own losses; the figures are COCO's average precision of boxes and masks.

    Masks are evaluated if the detector predicts them and the data have them. A validation computes average precision
    and no losses, since their inputs (sampled proposals, noised queries) exist in training only.

    Args:
        model: The detector, already built for the data's classes.
        recipe: As in `Task`.
        num_classes: Not used; all tasks receive it.
        kwargs: Further arguments of `Task`.

    Attributes:
        detections: Detections of all ranks in the test split, after a test.
        accuracies: Accuracy of boxes ("box") and masks ("mask"), after a test.
    """

    model: Detector
    methods = ("loss", "predict")

    def __init__(self, model: nn.Module, recipe: Mapping, *, num_classes: int, **kwargs):
        super().__init__(model, recipe, **kwargs)
        # Detections of this rank in the current evaluation.
        self._rank_detections: list[ImageDetections] = []
        self.detections: list[ImageDetections] = []
        self.accuracies: dict[str, Accuracy] = {}

    @staticmethod
    def build_net(cfg: Any, datamodule: Any) -> nn.Module:
        return build_detector(cfg, datamodule)

    @staticmethod
    def data_arguments(cfg: Any) -> dict[str, Any]:
        """Return `read_masks`, so that the data module reads masks only for a detector that learns them."""
        return {"read_masks": learns_masks(cfg.head, cfg.data.kind == "small")}

    def complexity(self, datamodule: Any) -> tuple[int, int]:
        """Return the number of parameters, and the multiply-accumulates for one image of the data's size.

        The image is padded to multiples of 32 pixels, as a batch is.
        """
        height, width = (round_up(side, 32) for side in datamodule.image_size)
        return complexity(self.model, (height, width), datamodule.in_chans)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.model.loss(
            batch["image"], batch["sizes"], batch["boxes"], batch["labels"], batch.get("masks"), batch["ignored"]
        )
        return self.sum_losses(losses, len(batch["image"]))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        original_sizes = batch["original_sizes"]
        predictions = self.model.predict(batch["image"], batch["sizes"], original_sizes)
        # Images that pad the last batch of a rank have the index -1.
        self._rank_detections += [
            ImageDetections.from_tensors(index, *prediction, size=size)
            for index, prediction, size in zip(
                batch["index"].tolist(), predictions, original_sizes.tolist(), strict=True
            )
            if index >= 0
        ]

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        datamodule = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        accuracies = self._evaluate(self._gather(), datamodule, "val")
        # A figure is None if the data have no objects for it. NaN then makes no checkpoint the best one.
        self.val_figures = {
            f"val/{kind}_{name}": math.nan if (value := accuracy.figures[name]) is None else value
            for kind, accuracy in accuracies.items()
            for name in VALIDATION_FIGURES
        }
        # Callbacks that monitor a figure read it from Lightning's log.
        self.log_dict(self.val_figures, logger=False)

    def on_test_epoch_end(self) -> None:
        datamodule = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self.detections = self._gather()
        self.accuracies = self._evaluate(self.detections, datamodule, "test")

    def _gather(self) -> list[ImageDetections]:
        """Return the detections of all ranks, each image once, and forget those of this rank."""
        detections, self._rank_detections = self._rank_detections, []
        if self.trainer.world_size > 1:
            parts: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, detections)
            detections = [image for part in parts for image in part]
        return merge(detections)

    def _evaluate(self, detections: list[ImageDetections], datamodule: Any, split: str) -> dict[str, Accuracy]:
        """Compute COCO's figures of a split, or LVIS's if its annotations are federated.

        Every rank computes them: if one rank did, the others would only wait for it.
        """
        images, categories = datamodule.images(split), datamodule.category_ids
        ids = images.ids.tolist()
        evaluated = [ids[image.index] for image in detections]
        results = coco_results(detections, ids, categories)
        kinds = ("box", "mask") if self.model.masks and datamodule.has_masks else ("box",)
        rules = evaluate if images.index.federated is None else evaluate_federated
        return {kind: rules(kind, results, images.truth, evaluated, categories) for kind in kinds}

    def test_figures(self, datamodule: Any) -> dict[str, Any]:
        """Return the number `n` of images, the figures of boxes and masks (COCO's or LVIS's), and figures by class.

        Names are `box_ap`, ..., `mask_ap`, ...; `per_class` is a dictionary by class.
        """
        images = datamodule.images("test")
        figures = {
            f"{kind}_{name}": value
            for kind, accuracy in self.accuracies.items()
            for name, value in accuracy.figures.items()
        }
        evaluated = images.ids[[image.index for image in self.detections]].tolist()
        classes = per_class(self.accuracies, images.truth, evaluated, datamodule.category_ids, datamodule.class_names)
        return {"n": len(self.detections), **figures, "per_class": classes}

    def write_report(self, folder: Path, datamodule: Any) -> None:
        """Write `detections.json`, `detection_ids.json`, `pr_curves.png`, `per_class.png` and `images/*.png`.

        `detection_ids.json` has the images and categories in COCO's format, which name the ids in `detections.json`.
        The last are pictures of `save_images` images, evenly spread over the split.
        """
        images, names, categories = datamodule.images("test"), datamodule.class_names, datamodule.category_ids
        ids = images.ids.tolist()
        write_results(folder / "detections.json", coco_results(self.detections, ids, categories))
        names_of_ids = {key: images.truth[key] for key in ("images", "categories")}
        write_text(folder / "detection_ids.json", json.dumps(names_of_ids))
        plot_precision_recall(folder / "pr_curves.png", self.accuracies)
        plot_class_ap(folder / "per_class.png", self.accuracies, names)

        step = max(1, len(self.detections) // max(1, self.save_images))
        drawn = self.detections[::step][: self.save_images]
        objects = {ids[detections.index]: [] for detections in drawn}
        for annotation in images.truth["annotations"]:
            if annotation["image_id"] in objects:
                objects[annotation["image_id"]].append(annotation)
        for detections in drawn:
            index = detections.index
            path, image, truth = self.picture_path(folder, images, index), images[index]["image"], objects[ids[index]]
            plot_detections(path, image, detections, truth, categories, names)
